"""A server under clients that hurry, leave, overload it, and change its adapters meanwhile."""

"""A base model: find it, name its layers, tell it from another."""

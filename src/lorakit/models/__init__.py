"""Base models: how to find one, what its layers are called, and how to tell it from another."""

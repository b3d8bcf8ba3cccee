"""A base model: load and quantise it, name its layers and targets, tell it from another."""

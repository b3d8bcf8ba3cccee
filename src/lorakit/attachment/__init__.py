"""An adapter into a model, out of it, and read back."""

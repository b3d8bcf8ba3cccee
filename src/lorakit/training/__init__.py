"""A training run, from settings to an adapter folder."""

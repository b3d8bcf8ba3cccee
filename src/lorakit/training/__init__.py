"""A training run and its resumption, from settings to an adapter folder."""

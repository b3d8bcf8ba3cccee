"""How fast a server answers clients who use different adapters, beside the plain model."""

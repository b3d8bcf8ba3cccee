"""One adapted layer, and the route that it reads."""

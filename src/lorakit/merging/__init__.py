"""An adapter into the weights, and the base back bit for bit."""

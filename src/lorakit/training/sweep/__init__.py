"""Many adapters trained in one batch, each as if alone."""

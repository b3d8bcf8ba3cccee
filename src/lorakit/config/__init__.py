"""Settings: their base class, those of each method, and those of a training run."""

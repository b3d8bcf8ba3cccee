"""The mathematics of adapted layers; plain torch is the reference implementation."""

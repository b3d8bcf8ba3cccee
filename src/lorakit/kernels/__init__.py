"""The mathematics of adapted layers, apart from modules: plain torch is the oracle."""

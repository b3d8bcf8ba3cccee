"""An adapter, and its files: lorakit's folder, PEFT's file format (peft*.py), loralib's .pt."""

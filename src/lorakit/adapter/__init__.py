"""An adapter, and its files: lorakit's and PEFT's folder, loralib's .pt."""

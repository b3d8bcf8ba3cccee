"""Adapter files: lorakit's and PEFT's folder, and loralib's .pt (docs/adapter-format.md)."""

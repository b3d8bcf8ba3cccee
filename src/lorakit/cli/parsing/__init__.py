"""Flags, settings files and help, made from the settings' classes."""

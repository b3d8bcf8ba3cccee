"""Rows to samples to batches: sources, row types, chat templates, labels, packing, metrics."""

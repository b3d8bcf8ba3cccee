"""Rows to tokens to batches: sources, row types, chat templates, labels, packing, metrics."""

"""Rows choose adapters: routes, and the batches that mix adapters."""

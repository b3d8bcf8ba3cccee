"""Benchmarks: lorakit beside its peers, in one run, in turns."""

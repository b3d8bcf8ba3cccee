"""Each family of transformers' models through every use of an adapter, tiny and random."""

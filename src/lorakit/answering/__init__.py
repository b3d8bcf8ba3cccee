"""What a model answers, with or without an adapter: texts, and their scores on held-out rows."""

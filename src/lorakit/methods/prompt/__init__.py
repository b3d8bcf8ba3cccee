"""PreEmbed and PreLayer: virtual tokens, put into the rows of each call."""

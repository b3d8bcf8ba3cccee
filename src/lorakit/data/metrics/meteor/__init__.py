"""METEOR 1.5 (Denkowski and Lavie, 2014) for English, equal to the official one, without Java."""

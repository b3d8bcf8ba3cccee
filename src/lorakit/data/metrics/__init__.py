"""Scores of a model's outputs, each equal to its task's official scorer."""

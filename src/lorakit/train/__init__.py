"""Training: the loss, the loop on transformers' Trainer, its guardrails, and scoring."""

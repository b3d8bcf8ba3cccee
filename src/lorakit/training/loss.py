"""The loss of a task: cross-entropy of tokens or classes, or a squared error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss:
    """The loss of a task, in the form of transformers' `compute_loss_func`.

    For texts it only holds the settings: `lorakit.training.lm_loss` computes their loss.
    """

    def __init__(self, task: str, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        self.task = task
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The summed loss over `num_items_in_batch`, or over the items of this batch."""
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return self.summed(logits, labels) / count

    def summed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of rows that each have a class, or a number, as their label."""
        assert self.task != "generation", "the loss of texts is computed by training/lm_loss.py"
        if self.task == "regression":
            return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum")
        wide = logits.float()
        summed = F.cross_entropy(
            wide, labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            summed = summed + self.z_loss * wide.logsumexp(-1).square().sum()
        return summed


def perplexity(loss: float) -> float:
    """The perplexity e^loss; infinity where that is beyond a float."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())

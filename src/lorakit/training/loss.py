"""The loss of a task: that of its objective, or of texts."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.data.objectives import OBJECTIVES
from lorakit.data.objectives.objective import Objective


class Loss:
    """The loss of a task, with its settings.

    For texts it only holds the settings: `lorakit.training.lm_loss` computes their loss.
    """

    def __init__(self, task: str, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        self.objective: Objective | None = OBJECTIVES.get(task)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def __call__(
        self, outputs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The summed loss over `num_items_in_batch`, or over the items of this batch."""
        assert self.objective is not None, "the loss of texts is computed by training/lm_loss.py"
        count = self.objective.count(labels) if num_items_in_batch is None else num_items_in_batch
        return self.summed(outputs, labels) / count

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of a batch of rows with labels."""
        assert self.objective is not None, "the loss of texts is computed by training/lm_loss.py"
        return self.objective.loss(
            outputs, labels, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )


def perplexity(loss: float) -> float:
    """The perplexity e^loss; infinity where that is beyond a float."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())

"""The loss: cross-entropy of the labelled tokens only, of classes, or a squared error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""Label of a token that is not trained on: prompt and padding."""


class Loss:
    """Computes the loss that transformers' Trainer asks for (its `compute_loss_func`)."""

    def __init__(self, task: str, *, label_smoothing: float = 0.0) -> None:
        self.task = task
        self.label_smoothing = label_smoothing

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the summed loss over `num_items_in_batch`, or over the items of this batch."""
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        summed, count = self.summed(logits, labels)
        return summed / (count if num_items_in_batch is None else num_items_in_batch)

    def of_tokens(
        self,
        logits: Float[Tensor, "tokens vocabulary"],
        targets: Int[Tensor, " tokens"],
        *,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the same for logits that each predict one labelled token."""
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return self._cross_entropy(logits, targets) / count

    def summed(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Return the sum of the loss over the labelled items, and how many there are."""
        if self.task == "regression":
            return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum"), len(
                labels
            )
        if self.task == "classification":
            return self._cross_entropy(logits, labels), len(labels)
        kept, targets = labelled_tokens(logits, labels)
        return self._cross_entropy(kept, targets), len(targets)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(), targets, reduction="sum", label_smoothing=self.label_smoothing
        )


def labelled_tokens(
    logits: Float[Tensor, "batch last vocabulary"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "tokens vocabulary"], Int[Tensor, " tokens"]]:
    """Return the logits that predict a labelled token, and those tokens.

    The logits may cover only the last positions of the rows (`logits_to_keep`). Position t predicts
    the token at t+1.
    """
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    chosen = targets != IGNORED
    return logits[:, :-1][chosen], targets[chosen]


def positions_to_keep(labels: Int[Tensor, "batch length"]) -> int:
    """Return how many last positions of the batch hold all that predict a labelled token."""
    labelled = (labels != IGNORED).any(dim=0).nonzero()
    first = int(labelled[0]) if len(labelled) else labels.shape[1] - 1
    # The token before the first labelled one predicts it.
    return labels.shape[1] - max(first - 1, 0)


def perplexity(loss: float) -> float:
    """Return e^loss, as infinity where that is beyond a float."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())

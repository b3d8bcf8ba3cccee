"""The loss of a task: that of its objective, or of texts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config.train import PreferenceSettings
from lorakit.data.objectives import OBJECTIVES
from lorakit.data.objectives.objective import Objective
from lorakit.data.objectives.preference import Preference
from lorakit.routing.route import route
from lorakit.training.trl_loss import TrlLoss


class Loss:
    """The loss of a task, with its settings.

    For texts it only holds the settings: `lorakit.training.lm_loss` computes their loss.
    """

    def __init__(
        self,
        task: str,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        preference: PreferenceSettings | None = None,
        through: TrlLoss | None = None,
    ) -> None:
        """Hold the settings of a task's loss; `through`: what computes it in lorakit's place."""
        self.through = through
        self.objective: Objective | None = OBJECTIVES.get(task)
        if isinstance(self.objective, Preference):
            settings = preference or PreferenceSettings()
            self.objective = Preference(settings=settings, without_adapter=_base)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def __call__(
        self, outputs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The summed loss over `num_items_in_batch`, or over the items of this batch."""
        assert self.objective is not None, "the loss of texts is computed by training/lm_loss.py"
        count = self.objective.count(labels) if num_items_in_batch is None else num_items_in_batch
        return self.summed(outputs, labels) / count

    def of_rows(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of a model for rows with labels, as a call has it for its outputs."""
        assert self.objective is not None, "the loss of texts is computed by training/lm_loss.py"
        if self.through is None:
            return self(self.objective.outputs(model, inputs), labels, num_items_in_batch)
        rows = self.objective.count(labels)
        count = rows if num_items_in_batch is None else num_items_in_batch
        return self.through(model, inputs) * (rows / count)

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of a batch of rows with labels."""
        assert self.objective is not None, "the loss of texts is computed by training/lm_loss.py"
        return self.objective.loss(
            outputs, labels, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )


def _base(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which a model answers as its base."""
    return route(model, None)


def perplexity(loss: float) -> float:
    """The perplexity e^loss; infinity where that is beyond a float."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())

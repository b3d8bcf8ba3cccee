"""Regression: each text, or pair of texts, has a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorakit.data.fields import as_number
from lorakit.data.metrics.basic import pearson
from lorakit.data.objectives.classification import Classification
from lorakit.data.objectives.objective import Names
from lorakit.data.row_types import ClassificationRow
from lorakit.data.samples import Example


class Regression(Classification):
    """Rows of classification whose label is a number to predict; the loss is its squared error."""

    task = "regression"
    best_by = "pearson"
    has_classes = False
    smooths = False

    def label(self, value: Any, known: Names) -> str | float:
        return as_number(value)

    def names(self, row: ClassificationRow) -> Iterable[str]:
        return ()

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        return F.mse_loss(outputs.float().squeeze(-1), labels.float(), reduction="sum")

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        return outputs.float().squeeze(-1).tolist()

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        return None

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        right: list[Any] = [each.labels for each in examples]
        return {"pearson": pearson(answers, right)}

"""Multi-label classification: each text, or pair of texts, is of any number of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorakit.config.rows import RowField
from lorakit.data.fields import FieldMap
from lorakit.data.labels import class_name
from lorakit.data.metrics.classes import check_sklearn, f1_of_sets
from lorakit.data.objectives.classification import text_draft, texts_of
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import MultiLabelRow, Row
from lorakit.data.samples import Draft, Example


class MultiLabel(Objective):
    """Rows of a text, or a pair, and the names of its classes, of which there may be none.

    The loss of a row is the mean binary cross-entropy of its classes. A class whose probability is
    above a half is predicted.
    """

    task = "multi-label"
    kind = "multi-label"
    needed = ("text", "labels")
    optional = ("text_pair",)
    right = ("labels",)
    best_by = "f1_micro"
    smooths = False

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        value = fields.value("labels", values)
        if value is None:
            raise UnusableRowError("labels are missing; a row of no class has an empty list")
        given = value.split(",") if isinstance(value, str) and value.strip() else value or []
        if not isinstance(given, list | tuple):
            raise UnusableRowError(
                f"labels is {value!r}, where a list of names is needed, or a text with commas"
            )
        names = tuple(class_name(each, known=known) for each in given)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or "" in names:
            raise UnusableRowError(
                f"labels has {', '.join(twice)} twice" if twice else "labels has an empty name"
            )
        text, pair = texts_of(fields, values)
        return MultiLabelRow(text=text, text_pair=pair, labels=names)

    def stand_in(self, fields: FieldMap, values: Values, known: Names) -> dict[RowField, Any]:
        return {"labels": []}

    def names(self, row: MultiLabelRow) -> Iterable[str]:
        return row.labels

    def draft(self, row: MultiLabelRow, encoding: LabelEncoding) -> Draft:
        chosen = tuple(float(name in row.labels) for name in encoding.numbers)
        return text_draft(row.text, row.text_pair, chosen, encoding)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(
            outputs.float(), labels.float(), reduction="none"
        )
        return losses.mean(-1).sum()

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        return (outputs > 0).int().tolist()

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        return outputs.float().sigmoid()

    def check_library(self) -> None:
        check_sklearn()

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        return f1_of_sets(answers, [each.labels for each in examples])

    def shown(self, answer: Any, names: Names) -> Any:
        return [name for name, chosen in zip(names or (), answer, strict=True) if chosen]

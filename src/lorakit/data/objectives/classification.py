"""Classification: each text, or pair of texts, is of one class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lorakit.config.rows import RowField, RowType
from lorakit.data.fields import FieldMap, as_text
from lorakit.data.labels import class_name
from lorakit.data.metrics.basic import accuracy, matthews
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import ClassificationRow, Row
from lorakit.data.samples import Draft, Example


class Classification(Objective):
    """Rows of a text, or a pair, and the name of its class; the loss is cross-entropy."""

    task = "classification"
    kind: ClassVar[RowType] = "classification"
    needed: ClassVar[tuple[RowField, ...]] = ("text", "label")
    optional: ClassVar[tuple[RowField, ...]] = ("text_pair",)
    best_by = "accuracy"

    def label(self, value: Any, known: Names) -> str | float:
        """The label of a row as its column has it.

        Raises:
            UnusableRowError: it is no label.
        """
        return class_name(value, known=known)

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        label = fields.value("label", values)
        if label is None or label == "":
            raise UnusableRowError("the label is missing")
        text, pair = texts_of(fields, values)
        return ClassificationRow(text=text, text_pair=pair, label=self.label(label, known))

    def names(self, row: ClassificationRow) -> Iterable[str]:
        return (str(row.label),)

    def draft(self, row: ClassificationRow, encoding: LabelEncoding) -> Draft:
        label = encoding.numbers[row.label] if isinstance(row.label, str) else row.label
        return text_draft(row.text, row.text_pair, label, encoding)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        wide = outputs.float()
        summed = F.cross_entropy(wide, labels, reduction="sum", label_smoothing=label_smoothing)
        if z_loss:
            summed = summed + z_loss * wide.logsumexp(-1).square().sum()
        return summed

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        return outputs.argmax(-1).tolist()

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        return outputs.float().softmax(-1)

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        right: list[Any] = [each.labels for each in examples]
        found = {"accuracy": accuracy(answers, right)}
        return found | ({"matthews": matthews(answers, right)} if best_by == "matthews" else {})

    def shown(self, answer: Any, names: Names) -> Any:
        return names[answer] if names else answer


def texts_of(fields: FieldMap, values: Values) -> tuple[str, str | None]:
    """The text of a raw row, and its pair if it has one.

    Raises:
        UnusableRowError: there is no text, or nothing in it.
    """
    pair = fields.value("text_pair", values)
    text = fields.text("text", values)
    beside = None if pair is None else as_text("text_pair", pair)
    if not text.strip() and not (beside or "").strip():
        raise UnusableRowError("text is empty" if pair is None else "text and text_pair are empty")
    return text, beside


def text_draft(text: str, pair: str | None, labels: Any, encoding: LabelEncoding) -> Draft:
    """The sample of a text or a pair; if it is too long, the longer of the two is cut."""
    tokenizer, texts = encoding.tokenizer, (text, pair)
    whole = tokenizer(*texts, verbose=False)
    cut = len(whole["input_ids"]) > encoding.limit
    kept = tokenizer(*texts, truncation=True, max_length=encoding.limit) if cut else whole
    example = Example(
        input_ids=kept["input_ids"], labels=labels, token_type_ids=kept.get("token_type_ids")
    )
    return Draft(example=example, cut_prompt=cut)

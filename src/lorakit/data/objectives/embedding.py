"""Embeddings of texts: those that belong together are to be near each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.config.rows import RowField
from lorakit.data.fields import FieldMap, as_number, as_text
from lorakit.data.metrics.basic import pearson
from lorakit.data.metrics.classes import check_scipy, spearman
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import PairRow, Row
from lorakit.data.samples import Draft, Example

SCALE = 20.0
"""The factor on cosines before a softmax: the inverse of a temperature of 0.05 (Gao 2021)."""


class Embedding(Objective):
    """Rows of two texts that belong together, with or without one that does not; or with a number.

    An embedding is the mean of the last hidden states of a text's tokens, of length 1. The loss of
    rows without numbers is the cross-entropy of each text's own pair among the pairs, and the texts
    that do not belong, of the whole batch (in-batch negatives, Henderson 2017). That of rows with
    numbers is of the order of the batch's cosines alone (CoSENT).
    """

    task = "embedding"
    kind = "embedding"
    needed = ("text", "text_pair")
    optional = ("negative", "label")
    right = ("label", "negative")
    best_by = "spearman"
    has_classes = False
    smooths = False
    unjoined = "has a mean of each row"

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        label, negative = (fields.value(name, values) for name in ("label", "negative"))
        if label is not None and negative is not None:
            raise UnusableRowError("a row with a label has no negative")
        texts = {
            "text": fields.text("text", values),
            "text_pair": fields.text("text_pair", values),
            **({} if negative is None else {"negative": as_text("negative", negative)}),
        }
        empty = [name for name, text in texts.items() if not text.strip()]
        if empty:
            raise UnusableRowError(f"{' and '.join(empty)} {'are' if empty[1:] else 'is'} empty")
        return PairRow(**texts, label=None if label is None else as_number(label))

    def stand_in(self, fields: FieldMap, values: Values, known: Names) -> dict[RowField, Any]:
        return {}

    def unlike(self, rows: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """Yield the number of each row with other fields than the first one, and which they are."""
        for name in ("negative", "label"):
            has = getattr(rows[0], name) is not None
            for number, row in enumerate(rows):
                if (getattr(row, name) is not None) != has:
                    yield (
                        number,
                        f"{name} is {'missing' if has else 'given'}, unlike in the first row",
                    )

    def needs_others(self, rows: Sequence[Any]) -> bool:
        return rows[0].negative is None

    def draft(self, row: PairRow, encoding: LabelEncoding) -> Draft:
        tokenizer: Any = encoding.tokenizer
        texts = [text for text in (row.text, row.text_pair, row.negative) if text is not None]
        whole = [tokenizer(text, verbose=False) for text in texts]
        kept = [tokenizer(text, truncation=True, max_length=encoding.limit) for text in texts]
        label = 0 if row.label is None else row.label
        first, *others = (
            Example(
                input_ids=each["input_ids"],
                labels=label,
                token_type_ids=each.get("token_type_ids"),
            )
            for each in kept
        )
        pairs = zip(whole, kept, strict=True)
        return Draft(
            example=first.beside(others),
            cut_prompt=any(len(a["input_ids"]) > len(b["input_ids"]) for a, b in pairs),
        )

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].to(states)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        first, *others = outputs.split(len(labels))
        if not labels.is_floating_point():
            cosines = first @ torch.cat(others).T
            own = torch.arange(len(labels), device=outputs.device)
            return F.cross_entropy(SCALE * cosines, own, reduction="sum")
        cosines = SCALE * (first * others[0]).sum(-1)
        above = labels[:, None] > labels[None, :]
        wrong = (cosines[None, :] - cosines[:, None])[above]
        return F.pad(wrong, (0, 1)).logsumexp(-1) * len(labels)

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        first, second, *_ = outputs.split(len(labels))
        return (first * second).sum(-1).tolist()

    def best_of(self, rows: Sequence[Any]) -> str:
        return self.best_by if rows[0].label is not None else "loss"

    def check_library(self) -> None:
        check_scipy()

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        right: list[Any] = [each.labels for each in examples]
        if not isinstance(right[0], float):
            return {}
        return {"spearman": spearman(answers, right), "pearson": pearson(answers, right)}

    def shown(self, answer: Any, names: Names) -> Any:
        return answer

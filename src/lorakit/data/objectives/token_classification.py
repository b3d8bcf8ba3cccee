"""Token classification: each word of a text has a tag, such as the entity that it is part of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorakit.config.rows import RowField
from lorakit.data.chat import IGNORED
from lorakit.data.fields import FieldMap, as_text
from lorakit.data.labels import class_name
from lorakit.data.metrics.classes import check_seqeval, scores_of_tags
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import Row, TaggedRow
from lorakit.data.samples import Draft, Example
from lorakit.errors import DataError


class TokenClassification(Objective):
    """Rows of words, each with a tag; the loss is the cross-entropy of a word's first token."""

    task = "token-classification"
    kind = "token-classification"
    needed = ("words", "tags")
    right = ("tags",)
    best_by = "f1"
    unjoined = "reads each row by itself"

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        words = [as_text("a word", each) for each in _list(fields, "words", values)]
        tags = [class_name(each, known=known) for each in _list(fields, "tags", values)]
        if len(words) != len(tags):
            raise UnusableRowError(
                f"{len(words)} words have {len(tags)} tags: each word needs one of its own"
            )
        empty = [number for number, word in enumerate(words, 1) if not word.strip()]
        if empty:
            raise UnusableRowError(f"word {empty[0]} is empty")
        return TaggedRow(words=tuple(words), tags=tuple(tags))

    def stand_in(self, fields: FieldMap, values: Values, known: Names) -> dict[RowField, Any]:
        assert known is not None
        return {"tags": [known[0]] * len(_list(fields, "words", values))}

    def names(self, row: TaggedRow) -> Iterable[str]:
        return row.tags

    def draft(self, row: TaggedRow, encoding: LabelEncoding) -> Draft:
        tokenizer: Any = encoding.tokenizer
        if not tokenizer.is_fast:
            raise DataError(
                "the base's tokenizer does not say where in a text a token is from:"
                " token-classification needs a fast one, with a tokenizer.json"
            )
        text = " ".join(row.words)
        how = {"return_offsets_mapping": True, "verbose": False}
        found = tokenizer(text, truncation=True, max_length=encoding.limit, **how)
        words = _words_of(text, row.words, found["offset_mapping"])
        labels = [
            IGNORED if word is None or word in words[:at] else encoding.numbers[row.tags[word]]
            for at, word in enumerate(words)
        ]
        if all(label == IGNORED for label in labels):
            raise UnusableRowError(
                f"none of its words has a token among the first {encoding.limit}"
            )
        example = Example(
            input_ids=found["input_ids"],
            labels=labels,
            token_type_ids=found.get("token_type_ids"),
            predicts_next=False,
        )
        return Draft(example=example, cut_prompt=len(row.words) - 1 not in words)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        # A batch that is joined with others is as long as the longest of them.
        wide = outputs[:, : labels.shape[1]].float().flatten(0, 1)
        targets = labels.flatten()
        summed = F.cross_entropy(
            wide,
            targets,
            reduction="sum",
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
        )
        if z_loss:
            squares = wide.logsumexp(-1).square()
            summed = summed + z_loss * squares[targets != IGNORED].sum()
        return summed

    def count(self, labels: Tensor) -> int:
        return int((labels != IGNORED).sum())

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        classes = outputs[:, : labels.shape[1]].argmax(-1)
        pairs = zip(classes, labels != IGNORED, strict=True)
        return [own[chosen].tolist() for own, chosen in pairs]

    def check_library(self) -> None:
        check_seqeval()

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        right = [[one for one in _labels(each) if one != IGNORED] for each in examples]
        found = [self.shown(each, names) for each in answers]
        return scores_of_tags(found, [self.shown(each, names) for each in right])

    def shown(self, answer: Any, names: Names) -> Any:
        assert names is not None
        return [names[number] for number in answer]


def _list(fields: FieldMap, name: RowField, values: Values) -> list[Any]:
    """The values of a field for each word: a list, or a text that white space divides.

    Raises:
        UnusableRowError: it has none.
    """
    value = fields.value(name, values)
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found:
        raise UnusableRowError(f"{name} is {value!r:.40}, where a list is needed, of one or more")
    return list(found)


def _words_of(
    text: str, words: Sequence[str], offsets: Sequence[tuple[int, int]]
) -> list[int | None]:
    """The number of the word that each token is from; None for those that frame a text.

    A token may begin with the space before its word.
    """
    starts = [0, *accumulate(len(word) + 1 for word in words[:-1])]
    found: list[int | None] = []
    for start, end in offsets:
        inside = text[start:end]
        first = start + len(inside) - len(inside.lstrip())
        found.append(bisect_right(starts, first) - 1 if inside.strip() else None)
    return found


def _labels(example: Example) -> list[int]:
    assert isinstance(example.labels, list)
    return example.labels

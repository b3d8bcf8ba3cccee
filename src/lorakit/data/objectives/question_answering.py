"""Extractive question answering: the answer to a question is a part of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.config.rows import RowField
from lorakit.data.fields import FieldMap, as_text
from lorakit.data.metrics.squad import check_torchmetrics, squad
from lorakit.data.objectives.objective import LabelEncoding, Names, Objective, Values
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import GoldAnswer, QuestionRow, Row
from lorakit.data.samples import ByToken, Draft, Example, TokenSpan
from lorakit.errors import DataError

LONGEST_ANSWER = 30
"""The most tokens of an answer, as in SQuAD's usual evaluation."""
CANDIDATES = 20
"""The likeliest starts and ends of a window that are combined."""


@dataclass(frozen=True)
class Window(ByToken):
    """A part of a context, for which the model has room beside the question."""

    row: QuestionRow
    offsets: tuple[tuple[int, int] | None, ...]
    """Of each token, its first character in the context and the one after it; None: it is not of
    the context."""

    def moved(self, order: Sequence[int]) -> Window:
        """The window of a longer sequence, each of whose positions has a source, or is virtual."""
        return replace(self, offsets=tuple(None if at < 0 else self.offsets[at] for at in order))


class QuestionAnswering(Objective):
    """Rows of a question, a context, and answers that are in it, or none (Rajpurkar et al. 2018).

    A long context becomes several samples, windows that overlap. In a window without the answer the
    first token is the label. The loss is the mean of two cross-entropies, of the first token of an
    answer and of its last, over the tokens of a window.

    Among rows of which some have no answer, the empty text is predicted of a row in all of whose
    windows the first token, as start and end, has larger summed logits than any span of any of them
    (Devlin et al. 2019, section 4.3, with the threshold 0). Elsewhere a span is.
    """

    task = "question-answering"
    kind = "question-answering"
    needed = ("question", "context", "answers")
    optional = ("is_impossible",)
    right = ("answers", "is_impossible")
    best_by = "f1"
    has_classes = False
    smooths = False
    unjoined = "chooses among the tokens of each row"

    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        question, context = fields.text("question", values), fields.text("context", values)
        for name, text in (("question", question), ("context", context)):
            if not text.strip():
                raise UnusableRowError(f"{name} is empty")
        answers = tuple(_answers(fields.value("answers", values), context))
        if answers and fields.value("is_impossible", values) not in (None, False, 0):
            raise UnusableRowError("it is_impossible, and has an answer")
        return QuestionRow(question=question, context=context, answers=answers)

    def stand_in(self, fields: FieldMap, values: Values, known: Names) -> dict[RowField, Any]:
        # All of the context: of rows with an answer the best span is predicted, never none.
        return {"answers": [fields.text("context", values)]}

    def may_answer_nothing(self, examples: Sequence[Example]) -> bool:
        return not all(_window(each).row.answers for each in examples)

    def without_answers(self, rows: Sequence[QuestionRow]) -> list[QuestionRow]:
        return [replace(row, answers=()) for row in rows]

    def draft(self, row: QuestionRow, encoding: LabelEncoding) -> Draft:
        return self.drafts(row, encoding)[0]

    def drafts(self, row: QuestionRow, encoding: LabelEncoding) -> list[Draft]:
        tokenizer: Any = encoding.tokenizer
        if not tokenizer.is_fast:
            raise DataError(
                "the base's tokenizer does not say where in a text a token is from:"
                " question-answering needs a fast one, with a tokenizer.json"
            )
        question = tokenizer(row.question, add_special_tokens=False, verbose=False)["input_ids"]
        room = encoding.limit - len(question) - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise UnusableRowError(
                f"the question leaves no room for a context within {encoding.limit} tokens"
            )
        found = tokenizer(
            row.question,
            row.context,
            truncation="only_second",
            max_length=encoding.limit,
            stride=min(encoding.stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = range(len(found["input_ids"]))
        return [Draft(example=_example(row, found, number)) for number in windows]

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        found = model(**inputs)
        logits = torch.stack([found.start_logits, found.end_logits], dim=-1).float()
        padding = inputs["attention_mask"] == 0
        return logits.masked_fill(padding[..., None], torch.finfo(logits.dtype).min)

    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        starts, ends = (
            F.cross_entropy(outputs[..., side], labels[:, side], reduction="sum") for side in (0, 1)
        )
        return (starts + ends) / 2

    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        return list(outputs.cpu())

    def combined(self, answers: Sequence[Any], examples: Sequence[Example]) -> list[Any]:
        """The text of each row's answer: the span of the largest summed logits of its windows."""
        found = []
        may_be_none = self.may_answer_nothing(examples)
        pairs = zip(answers, map(_window, examples), strict=True)
        for _, group in groupby(pairs, key=lambda pair: id(pair[1].row)):
            own = list(group)
            score, text = max((_best_span(*each) for each in own), key=lambda best: best[0])
            none = min(float(logits[0].sum()) for logits, _ in own)
            found.append("" if may_be_none and none > score else text)
        return found

    def check_library(self) -> None:
        check_torchmetrics()

    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        rows = {id(row): row for row in (_window(each).row for each in examples)}
        return squad(answers, [row.reference for row in rows.values()])

    def shown(self, answer: Any, names: Names) -> Any:
        return answer


def _answers(value: Any, context: str) -> Iterator[GoldAnswer]:
    """The answers of a row: SQuAD's texts with their first characters, or texts alone; none of [].

    Raises:
        UnusableRowError: the field is missing, or an answer is not in the context.
    """
    starts: Sequence[Any] = ()
    if isinstance(value, Mapping):
        value, starts = value.get("text"), value.get("answer_start") or ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise UnusableRowError(
            "answers is missing or no list: a question that the context does not answer has an"
            " empty one, as in SQuAD 2"
        )
    if starts and len(starts) != len(texts):
        raise UnusableRowError(f"answers has {len(texts)} texts and {len(starts)} answer_start")
    for number, each in enumerate(texts):
        text = as_text("answers", each)
        start = starts[number] if starts else context.find(text)
        if not text.strip():
            raise UnusableRowError("an answer is empty: a question without one has an empty list")
        if not isinstance(start, int) or start < 0 or not context.startswith(text, start):
            where = f" at character {start}" if starts else ""
            raise UnusableRowError(f"the answer {text!r:.40} is not in the context{where}")
        yield GoldAnswer(text, start)


def _example(row: QuestionRow, found: Any, number: int) -> Example:
    """The sample of one window, as the tokenizer divided the context."""
    inside = found.sequence_ids(number)
    offsets = tuple(
        tuple(pair) if text == 1 else None
        for pair, text in zip(found["offset_mapping"][number], inside, strict=True)
    )
    types = found["token_type_ids"][number] if "token_type_ids" in found else None
    return Example(
        input_ids=found["input_ids"][number],
        labels=_span(row.answers[0], offsets) if row.answers else TokenSpan(0, 0),
        token_type_ids=types,
        about=Window(row, offsets),
    )


def _span(answer: GoldAnswer, offsets: Sequence[tuple[int, int] | None]) -> TokenSpan:
    """The tokens of an answer in a window; its first one where the answer is not whole in it."""
    first, last = answer.start, answer.start + len(answer.text)
    inside = [at for at, pair in enumerate(offsets) if pair and pair[0] < last and pair[1] > first]
    known = [pair for pair in offsets if pair]
    if not inside or known[0][0] > first or known[-1][1] < last:
        return TokenSpan(0, 0)
    return TokenSpan(inside[0], inside[-1])


def _window(example: Example) -> Window:
    assert isinstance(example.about, Window)
    return example.about


def _best_span(logits: Tensor, window: Window) -> tuple[float, str]:
    """The largest sum of a start's and an end's logit in a window, and the text between them."""
    offsets = window.offsets
    inside = torch.tensor([pair is not None for pair in offsets])
    own = logits[: len(offsets)].masked_fill(~inside[:, None], torch.finfo(logits.dtype).min)
    likely = own.topk(min(CANDIDATES, len(offsets)), dim=0).indices.T.tolist()
    best = (torch.finfo(logits.dtype).min, "")
    for start in likely[0]:
        for end in likely[1]:
            first, last = offsets[start], offsets[end]
            if first is None or last is None or not start <= end < start + LONGEST_ANSWER:
                continue
            score = float(own[start, 0] + own[end, 1])
            best = max(best, (score, window.row.context[first[0] : last[1]]))
    return best

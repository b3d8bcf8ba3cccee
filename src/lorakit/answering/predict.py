"""What adapters with heads, or a base with one, say of rows; a batch has rows of several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.answering.answer import Note, warn
from lorakit.answering.readers import COLUMN, AskedRows, Reader, readers_of, rows_asked
from lorakit.attachment.open_model import check_head
from lorakit.bank import AdapterBank
from lorakit.config.answering import PredictConfig
from lorakit.data.collate import Collator
from lorakit.data.samples import Example, TokenSpan
from lorakit.errors import AdapterFileError, LorakitError, RouteError
from lorakit.models.load import load_model
from lorakit.training.progress import steps
from lorakit.training.virtual_tokens import encode_for


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one adapter says of one row."""

    row: int
    """The number of the row in its source, from 0."""
    adapter: str | None
    """Its name; None: the base says it."""
    columns: Mapping[str, Any]
    """The row as it was read."""
    answer: Any
    """A class, several, a number, a tag for each word, a part of a text, or the cosine of two."""
    probabilities: Mapping[str, float] | None
    """Of each class, where there are classes of whole rows."""

    @property
    def record(self) -> dict[str, Any]:
        """The row's columns, and beside them who answers, the answer and the probabilities."""
        named = {} if self.adapter is None else {COLUMN: self.adapter}
        found = {**self.columns, **named, "answer": self.answer}
        if self.probabilities is not None:
            found["probabilities"] = {k: round(v, 6) for k, v in self.probabilities.items()}
        return found


def predict(
    *adapters: str | os.PathLike[str], progress: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """What adapters with heads, or a base with one, say of rows.

    Args:
        adapters: folders, or ids of the hub; none: the model alone.
        progress: show a bar on stderr.
        settings: those of `lorakit predict`, such as input="rows.jsonl".

    Returns:
        For each answer the columns of its row, `adapter` with the adapter's name, `answer`, and for
        classes of whole rows `probabilities` of each.

    Raises:
        LorakitError: a setting is wrong, or an adapter, the base or the rows cannot be used.

    Examples:
        >>> answers = lk.predict("out/polarity", "out/topic", input="mixed.jsonl")  # doctest: +SKIP
        >>> answers[0]["answer"]  # doctest: +SKIP
        'positive'
    """
    config = PredictConfig(**{"adapters": adapters, **settings})
    return [each.record for each in predictions(config, progress=progress)]


def predictions(
    config: PredictConfig, *, progress: bool = False, note: Note = warn
) -> list[Prediction]:
    """What adapters, or the base, say of rows: of each row in order, of each adapter in order.

    Rows of one batch may be for different adapters, with heads of different tasks and numbers of
    classes; only their model without its head must be the same.

    Args:
        config: the settings.
        progress: show a bar on stderr.
        note: is called with each remark on the rows.

    Raises:
        ConfigError: adapters do not go together, or write texts.
        DataError: rows cannot be used; lists what is wrong.
        AdapterFileError: an adapter's files are unusable, or do not fit the base.
        ModelError: the base cannot be found, or there is no trained head.
    """
    base, readers = readers_of(config)
    asked = rows_asked(config, readers)
    for remark in dict.fromkeys(line for each in asked for line in each.rows.notes):
        note(remark)
    model, tokenizer = _model(config, base, readers[0])
    bank = AdapterBank(model, allow_other_base=config.allow_other_base)
    _fill(bank, model, base, readers)
    found = _Answers(config, bank, tokenizer, asked, progress=progress, note=note).all()
    return sorted(found, key=lambda each: each.row)


def _fill(bank: AdapterBank, model: PreTrainedModel, base: str, readers: Sequence[Reader]) -> None:
    """Have a bank hold the adapters.

    Raises:
        LorakitError: some do not fit, or lack a head; with the reason of each.
    """
    problems: dict[str, LorakitError] = {}
    for reader in readers:
        try:
            check_head(model, reader.adapter, base, reader.task)
            if reader.adapter is not None and reader.name is not None:
                bank.add(reader.name, reader.adapter)
        except LorakitError as error:
            problems[reader.name or base] = error
    if problems and len(readers) == 1:
        raise next(iter(problems.values()))
    if problems:
        raise AdapterFileError.listing(
            f"these adapters cannot be asked on {base}",
            [f"{name}: {error}" for name, error in problems.items()],
        )


def _model(
    config: PredictConfig, base: str, first: Reader
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    how: dict[str, Any] = {
        "dtype": config.dtype,
        "task": first.task,
        "labels": first.labels,
        "device": config.device,
    }
    if first.adapter is not None:
        return first.adapter.load_base(base, quantize=config.quantize, **how)
    way = None if config.quantize in ("none", "as-trained") else config.quantize
    return load_model(base, quantize=way, **how)


@dataclass(frozen=True)
class _Sample:
    """A sample of a row, and who is to answer it."""

    asked: int
    """The place of its reader among those that are asked."""
    place: int
    """Its own among the reader's samples."""
    example: Example


class _Answers:
    """The answers to rows that have been read."""

    def __init__(
        self,
        config: PredictConfig,
        bank: AdapterBank,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[AskedRows],
        *,
        progress: bool,
        note: Note,
    ) -> None:
        self._config, self._bank, self._asked = config, bank, asked
        self._progress, self._note = progress, note
        self._collate = Collator(tokenizer)
        self._encoded = [
            encode_for(bank.model, each.reader.name, each.rows, tokenizer, each.reader.data)
            for each in asked
        ]

    def all(self) -> Iterator[Prediction]:
        """Yield what each reader says of its rows, one reader after the other."""
        try:
            found = self._found(apart=False)
        except RouteError as error:
            self._note(f"one adapter after the other: {error}")
            found = self._found(apart=True)
        for at, (asked, encoded) in enumerate(zip(self._asked, self._encoded, strict=True)):
            told = [found[at, place] for place in range(len(encoded))]
            yield from _predictions(asked, encoded.examples, told)

    @torch.no_grad()
    def _found(self, *, apart: bool) -> dict[tuple[int, int], tuple[Any, Any]]:
        """What is said of each sample, by its reader's place and its own: answer, probabilities.

        Args:
            apart: batches are of one reader each.
        """
        self._bank.model.eval()
        found: dict[tuple[int, int], tuple[Any, Any]] = {}
        batches = list(self._batches(apart=apart))
        for at in steps(len(batches), 1, title="predicting", show=self._progress):
            found |= self._told(batches[at])
        return found

    def _batches(self, *, apart: bool) -> Iterator[list[_Sample]]:
        each = [
            [_Sample(at, place, example) for place, example in enumerate(encoded.examples)]
            for at, encoded in enumerate(self._encoded)
        ]
        size = self._config.batch_size
        for samples in each if apart else [[one for own in each for one in own]]:
            # Rows of similar length share a batch, so that little of it is padding.
            ordered = sorted(samples, key=lambda sample: len(sample.example.input_ids))
            yield from (ordered[at : at + size] for at in range(0, len(ordered), size))

    def _told(self, samples: Sequence[_Sample]) -> dict[tuple[int, int], tuple[Any, Any]]:
        """What is said of the samples of one batch."""
        readers = [self._asked[sample.asked].reader for sample in samples]
        first = readers[0].objective
        batch = self._collate([_unlabelled(each.example) for each in samples])
        device = next(self._bank.model.parameters()).device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        # Texts of rows of two are all first ones, then all second ones.
        texts = 1 + len(samples[0].example.others)
        with self._bank.route([each.name for each in readers] * texts):
            outputs = first.outputs(self._bank.model, batch).unflatten(0, (texts, -1))
        told: dict[tuple[int, int], tuple[Any, Any]] = {}
        for at in dict.fromkeys(sample.asked for sample in samples):
            rows = [row for row, sample in enumerate(samples) if sample.asked == at]
            reader = self._asked[at].reader
            own = outputs[:, rows].flatten(0, 1)[..., : reader.width]
            answers = reader.objective.answers(own, labels[rows])
            probabilities = reader.objective.probabilities(own)
            shares = [None] * len(rows) if probabilities is None else probabilities.tolist()
            pairs = zip(answers, shares, strict=True)
            told |= zip(((at, samples[row].place) for row in rows), pairs, strict=True)
        return told


def _unlabelled(example: Example) -> Example:
    """A sample whose stand-in for a label goes with those of heads for other labels."""
    of_tokens = isinstance(example.labels, list | TokenSpan)
    return example if of_tokens else replace(example, labels=0)


def _predictions(
    asked: AskedRows, examples: Sequence[Example], told: Sequence[tuple[Any, Any]]
) -> Iterator[Prediction]:
    """What one reader says of its rows, from what it says of their samples."""
    reader = asked.reader
    answers = reader.objective.combined([answer for answer, _ in told], examples)
    shares = [share for _, share in told] if len(told) == len(answers) else [None] * len(answers)
    for number, row, answer, share in zip(asked.numbers, asked.raw, answers, shares, strict=True):
        yield Prediction(
            row=number,
            adapter=reader.name,
            columns=row.values,
            answer=reader.objective.shown(answer, reader.labels),
            probabilities=None
            if share is None
            else dict(zip(reader.labels or (), share, strict=True)),
        )

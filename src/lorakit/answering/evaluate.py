"""Scores of a model, with or without an adapter, on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.adapter.adapter import AdapterSource
from lorakit.adapter.atomic_write import write_new_file
from lorakit.adapter.output_place import check_new
from lorakit.attachment.open_model import ModelSource, Opened, opened_model
from lorakit.attachment.state import active_name
from lorakit.config.answering import EvaluateConfig
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_prompt
from lorakit.data.metrics.basic import bleu, check_library, exact_match
from lorakit.data.row_types import Row, Rows, references_of
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, DataError
from lorakit.training.answer import answer, warn
from lorakit.training.evaluation import score
from lorakit.training.loss import Loss
from lorakit.training.virtual_tokens import encode_for

WRITTEN = ("exact_match", "bleu")
"""Scores for which the model generates answers."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model, and the rows that they are of."""

    rows: int
    source: str
    """Where the rows are from."""
    task: str
    scores: dict[str, float]
    notes: tuple[str, ...]
    """What was cut or left out, and from which scores."""


def evaluate(
    *,
    adapter: AdapterSource | None = None,
    model: ModelSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """The scores of a model on held-out rows, with an adapter or without.

    Args:
        adapter: a folder, a hub id, or an `Adapter`. None: the model alone; a loaded one as it is.
        model: the base by name, or a loaded one, which is left as it was found. None: the base
            that the adapter was trained on.
        tokenizer: that of a loaded model.
        progress: show a bar on stderr.
        settings: those of `lorakit evaluate`, such as data=DataConfig(validation="rows.jsonl").

    Returns:
        `loss` (nats) and `perplexity`, `exact_match` (0 to 1) and `bleu` (0 to 100) of texts; of
        classes `loss` and `accuracy`, of numbers `loss` and `pearson`.

    Raises:
        LorakitError: a setting is wrong, or the model, the adapter or the rows cannot be used.

    Examples:
        >>> data = lk.DataConfig(validation="builtin:places:test", validation_rows=2)
        >>> scores = lk.evaluate(adapter="out/places", data=data, metrics=["loss"])
        >>> sorted(scores)
        ['loss', 'perplexity']
    """
    config = EvaluateConfig(**settings)
    found = evaluation(config, adapter, model, tokenizer, progress=progress)
    for note in found.notes:
        warn(note)
    return found.scores


def evaluation(
    config: EvaluateConfig,
    adapter: AdapterSource | None,
    model: ModelSource | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool,
) -> Evaluation:
    """The scores of `evaluate`, with what they are of."""
    _check(config)
    with opened_model(
        config, adapter, model, tokenizer, task=config.task, data=config.data
    ) as opened:
        rows = _rows(opened)
        wanted, asked = _to_answer(config, opened, rows)
        if config.outputs is not None and not wanted:
            raise ConfigError(
                "outputs is a file for answers, and none are generated here: they are for the "
                f"metrics {' and '.join(WRITTEN)} on rows with prompts"
            )
        notes = [*rows.notes, *_left_out(config, opened, rows, asked)]
        scores = _scores(config, opened, rows, notes, progress=progress)
        if wanted:
            scores |= _written_scores(config, opened, asked, wanted, notes, progress=progress)
    return Evaluation(
        rows=len(rows), source=rows.source, task=opened.task, scores=scores, notes=tuple(notes)
    )


def _check(config: EvaluateConfig) -> None:
    unknown = sorted(set(config.metrics) - {"loss", *WRITTEN})
    if unknown:
        raise ConfigError(f"metrics: {unknown} unknown; there are loss, {', '.join(WRITTEN)}")
    if config.data.validation is None:
        raise ConfigError("data.validation must say which rows to score")
    if config.outputs is not None:
        check_new(config.outputs)


def _rows(opened: Opened) -> Rows:
    data = opened.data
    assert data.validation is not None
    return read_rows(
        data.validation,
        data,
        limit=data.validation_rows,
        split="test",
        labels=opened.labels,
        task=opened.task,
        answered=False,
    )


def _to_answer(config: EvaluateConfig, opened: Opened, rows: Rows) -> tuple[list[str], list[Row]]:
    """The scores for which answers are generated, and the rows to answer, which have references.

    Raises:
        DataError: no row has a reference.
        MissingExtraError: the library that computes a score is not installed.
    """
    wanted = [name for name in WRITTEN if name in config.metrics]
    if opened.task != "generation" or not wanted:
        return [], []
    asked = [row for row in rows.rows if references_of(row)]
    if not asked and not (rows.kind == "text" and "loss" in config.metrics):
        raise DataError(
            f"{rows.source}: none of its {len(rows)} {rows.kind} rows has an answer to compare"
            f" with, which {' and '.join(wanted)} need: metrics: loss needs none"
        )
    for name in wanted if asked else ():
        check_library(name)
    return (wanted if asked else []), asked


def _left_out(
    config: EvaluateConfig, opened: Opened, rows: Rows, asked: Sequence[Row]
) -> list[str]:
    names = " and ".join(name for name in WRITTEN if name in config.metrics)
    left = len(rows) - len(asked)
    if not names or not left or opened.task != "generation":
        return []
    return [f"{names}: left out {left:,} of {len(rows):,} rows, without an answer to compare with"]


def _scores(
    config: EvaluateConfig, opened: Opened, rows: Rows, notes: list[str], *, progress: bool
) -> dict[str, float]:
    """The loss, and the scores that come with it."""
    if opened.task == "generation" and "loss" not in config.metrics:
        return {}
    name = active_name(opened.model)
    encoded = encode_for(opened.model, name, rows, opened.tokenizer, opened.data)
    notes += [f"loss: {line}" for line in encoded.report.losses()]
    return score(
        opened.model,
        encoded.examples,
        loss=Loss(opened.task),
        collate=Collator(opened.tokenizer),
        batch_size=config.batch_size,
        progress=progress,
    )


def _written_scores(
    config: EvaluateConfig,
    opened: Opened,
    rows: Sequence[Row],
    wanted: Sequence[str],
    notes: list[str],
    *,
    progress: bool,
) -> dict[str, float]:
    """The scores of generated answers."""
    prompts = [encode_prompt(row, opened.tokenizer, opened.data) for row in rows]
    answers = answer(
        opened.model,
        opened.tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        num_beams=config.num_beams,
        progress=progress,
        note=notes.append,
    )
    if config.outputs is not None:
        write_new_file(config.outputs, _lines(opened, rows, prompts, answers).encode())
    references = [references_of(row) for row in rows]
    compute = {"exact_match": exact_match, "bleu": bleu}
    return {name: compute[name](answers, references) for name in wanted}


def _lines(
    opened: Opened, rows: Sequence[Row], prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> str:
    records = (
        {
            "prompt": opened.tokenizer.decode(list(prompt)),
            "answer": text,
            "references": list(references_of(row)),
        }
        for row, prompt, text in zip(rows, prompts, answers, strict=True)
    )
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

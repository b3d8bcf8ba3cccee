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
from lorakit.data.metrics.basic import bleu, exact_match
from lorakit.data.row_types import Rows, references_of
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError
from lorakit.training.evaluation import answer, score
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
    """
    config = EvaluateConfig(**settings)
    return evaluation(config, adapter, model, tokenizer, progress=progress).scores


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
        if config.outputs is not None and not _written(config, opened, rows):
            raise ConfigError(
                "outputs is a file for answers, and none are generated here: they are for the "
                f"metrics {' and '.join(WRITTEN)} on rows with prompts"
            )
        scores = _scores(config, opened, rows, progress=progress)
    return Evaluation(rows=len(rows), source=rows.source, task=opened.task, scores=scores)


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
        regression=opened.task == "regression",
    )


def _scores(
    config: EvaluateConfig, opened: Opened, rows: Rows, *, progress: bool
) -> dict[str, float]:
    scores: dict[str, float] = {}
    if opened.task != "generation" or "loss" in config.metrics:
        scores = score(
            opened.model,
            encode_for(
                opened.model, active_name(opened.model), rows, opened.tokenizer, opened.data
            ).examples,
            loss=Loss(opened.task),
            collate=Collator(opened.tokenizer),
            batch_size=config.batch_size,
            progress=progress,
        )
    wanted = _written(config, opened, rows)
    if wanted:
        answers = _answers(config, opened, rows, progress=progress)
        references = [references_of(row) for row in rows.rows]
        compute = {"exact_match": exact_match, "bleu": bleu}
        scores |= {name: compute[name](answers, references) for name in wanted}
    return scores


def _written(config: EvaluateConfig, opened: Opened, rows: Rows) -> list[str]:
    """The metrics that are asked for and need generated answers."""
    answered = opened.task == "generation" and rows.kind != "text"
    return [name for name in WRITTEN if name in config.metrics and answered]


def _answers(config: EvaluateConfig, opened: Opened, rows: Rows, *, progress: bool) -> list[str]:
    prompts = [encode_prompt(row, opened.tokenizer, opened.data) for row in rows.rows]
    answers = answer(
        opened.model,
        opened.tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        num_beams=config.num_beams,
        progress=progress,
    )
    if config.outputs is not None:
        write_new_file(config.outputs, _lines(opened, rows, prompts, answers).encode())
    return answers


def _lines(
    opened: Opened, rows: Rows, prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> str:
    records = (
        {
            "prompt": opened.tokenizer.decode(list(prompt)),
            "answer": text,
            "references": list(references_of(row)),
        }
        for row, prompt, text in zip(rows.rows, prompts, answers, strict=True)
    )
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

"""The verb evaluate: scores of a model, with or without an adapter, on held-out rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lorakit.adapter.atomic_write import write_new_file
from lorakit.adapter.output_place import check_new
from lorakit.attachment.open_model import Opened, open_model
from lorakit.attachment.state import active_name
from lorakit.cli.verbs import Result
from lorakit.config.base import DType, HeldIn, Names, PositiveInt, Settings
from lorakit.config.train import DataConfig
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


class EvaluateConfig(Settings):
    """Settings of evaluate: the model and adapter, the rows, and the scores."""

    adapter: Path | None = None
    """Adapter folder; None: the model alone."""

    model: str | None = None
    """Base model. None: the one that the adapter was trained on."""

    data: DataConfig = DataConfig()
    """Rows: `data.validation` names them; what else is unset is as it was in training."""

    task: Literal["generation", "classification", "regression"] | None = None
    """What the model does. None: what the adapter was trained for, else generation."""

    metrics: Names = ("loss", "exact_match", "bleu")
    """For generation: loss (with perplexity), exact_match, bleu. Others have loss and one score."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the adapter's training), none (in
    `dtype`), 4bit or 8bit."""

    batch_size: PositiveInt = 16
    """Rows at once."""

    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""

    num_beams: PositiveInt = 1
    """Beams of the search for answers; 1 is greedy."""

    outputs: Path | None = None
    """File for the answers, as JSON lines of prompt, answer and references."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""


SETTINGS: type[Settings] = EvaluateConfig


def run(settings: EvaluateConfig) -> Result:
    """Score the rows and print each score."""
    unknown = sorted(set(settings.metrics) - {"loss", *WRITTEN})
    if unknown:
        raise ConfigError(f"metrics: {unknown} unknown; there are loss, {', '.join(WRITTEN)}")
    if settings.data.validation is None:
        raise ConfigError("data.validation must say which rows to score")
    if settings.outputs is not None:
        check_new(settings.outputs)
    opened = open_model(
        settings.adapter,
        model=settings.model,
        dtype=settings.dtype,
        quantize=settings.quantize,
        task=settings.task,
        data=settings.data,
        allow_other_base=settings.allow_other_base,
    )
    data = opened.data
    assert data.validation is not None
    rows = read_rows(
        data.validation,
        data,
        limit=data.validation_rows,
        split="test",
        labels=opened.labels,
        regression=opened.task == "regression",
    )
    if settings.outputs is not None and not _written(settings, opened, rows):
        raise ConfigError(
            "outputs is a file for answers, and none are generated here: they are for the metrics "
            f"{' and '.join(WRITTEN)} on rows with prompts"
        )
    scores = _scores(settings, opened, rows)
    lines = [f"{name:12} {value:.4f}" for name, value in scores.items()]
    return Result(
        text="\n".join([f"{len(rows)} rows of {rows.source}", *lines]),
        data={"rows": len(rows), "source": rows.source, "task": opened.task, **scores},
    )


def _scores(settings: EvaluateConfig, opened: Opened, rows: Rows) -> dict[str, float]:
    scores: dict[str, float] = {}
    if opened.task != "generation" or "loss" in settings.metrics:
        scores = score(
            opened.model,
            encode_for(
                opened.model, active_name(opened.model), rows, opened.tokenizer, opened.data
            ).examples,
            loss=Loss(opened.task),
            collate=Collator(opened.tokenizer),
            batch_size=settings.batch_size,
            progress=True,
        )
    wanted = _written(settings, opened, rows)
    if wanted:
        answers = _answers(settings, opened, rows)
        references = [references_of(row) for row in rows.rows]
        compute = {"exact_match": exact_match, "bleu": bleu}
        scores |= {name: compute[name](answers, references) for name in wanted}
    return scores


def _written(settings: EvaluateConfig, opened: Opened, rows: Rows) -> list[str]:
    """The metrics that are asked for and need generated answers."""
    answered = opened.task == "generation" and rows.kind != "text"
    return [name for name in WRITTEN if name in settings.metrics and answered]


def _answers(settings: EvaluateConfig, opened: Opened, rows: Rows) -> list[str]:
    prompts = [encode_prompt(row, opened.tokenizer, opened.data) for row in rows.rows]
    answers = answer(
        opened.model,
        opened.tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        num_beams=settings.num_beams,
        progress=True,
    )
    if settings.outputs is not None:
        write_new_file(settings.outputs, _lines(opened, rows, prompts, answers).encode())
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

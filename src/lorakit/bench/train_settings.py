"""The settings of the benchmark of training, and the rows and the run that follow from them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.config.bench import TrainBenchConfig
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import TrainConfig
from lorakit.data.row_types import PromptRow
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, DataError

WARM_UP_STEPS = 20
"""Steps over which the learning rate rises, where the run is at least twice as long."""


def draw_rows(settings: TrainBenchConfig, count: int, *, what_for: str) -> list[PromptRow]:
    """Random rows without repetition, in the order in which they were drawn.

    Raises:
        DataError: there are too few, or they have no prompts.
    """
    source = settings.data.train
    if source is None:
        raise DataError("data.train must say which rows to train on")
    found = read_rows(source, settings.data, limit=settings.data.train_rows).rows
    rows = [row for row in found if isinstance(row, PromptRow)]
    if len(rows) < len(found):
        raise DataError(f"{source} has no prompts: rows with a prompt and a completion are needed")
    if len(rows) < count:
        raise DataError(
            f"{what_for} need {count} rows, but {source} has {len(rows)}: "
            "request fewer, or give another file"
        )
    return random.Random(settings.seed).sample(rows, count)


def write_rows(rows: Iterable[PromptRow], file: Path) -> None:
    """Write rows as JSON lines that `lorakit train` reads."""
    lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows)
    file.write_text("\n".join(lines), encoding="utf-8")


def run_settings(
    settings: TrainBenchConfig, *, rows: Path, out: Path, steps: int, own: Mapping[str, Any] | None
) -> TrainConfig:
    """The settings of `lorakit train` for one participant.

    Args:
        settings: those that all participants share.
        rows: the file of the training rows, as `write_rows` writes it.
        out: the folder of the run.
        steps: optimizer steps.
        own: the participant's own settings of `lorakit train`.

    Raises:
        ConfigError: `own` has a setting that all participants share, or an unknown one.
    """
    read: dict[str, Any] = {"train": str(rows), "train_rows": None, "validation": None}
    shared: dict[str, Any] = {
        "model": settings.model,
        "out": out,
        "lora": LoRAConfig(
            rank=settings.rank, targets=settings.targets, dtype=settings.adapter_dtype
        ),
        "data": settings.data.model_copy(update={**read, "fields": {}}),
        "dtype": settings.dtype,
        "steps": steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "warmup_steps": min(WARM_UP_STEPS, steps // 2),
        "seed": settings.seed,
    }
    twice = sorted((own or {}).keys() & shared)
    if twice:
        raise ConfigError(f"all participants share {', '.join(twice)}: `ours` cannot set them")
    return TrainConfig(**(own or {}), **shared)

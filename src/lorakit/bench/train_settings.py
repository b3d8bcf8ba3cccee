"""The settings of the benchmark of training, and the rows and the run that follow from them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lorakit.bench.result import BenchConfig
from lorakit.config.base import Names, PositiveFloat, PositiveInt
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.row_types import PromptRow
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, DataError

WARM_UPS = 1
"""Rounds that do not count: the first steps compile, allocate and fill caches."""
WARM_UP_STEPS = 20
"""Steps over which the learning rate rises, where the run is at least twice as long."""


class TrainBenchConfig(BenchConfig):
    """What is trained, on what, and who takes part."""

    rank: PositiveInt = 8
    """Rank of the adapters."""

    targets: Names = ("q", "v")
    """Layers to adapt, in the words of lora.targets of `lorakit train`."""

    data: DataConfig = DataConfig(train="builtin:places", max_length=256)
    """Where the rows come from; they must have a prompt and a completion."""

    batch_size: PositiveInt = 8
    """Rows per step."""

    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of AdamW for the adapters."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of rows, of their order and of A."""

    ours: dict[str, Any] | None = None
    """Other settings of `lorakit train` for ours, such as {memory: low}."""

    steps: PositiveInt = 4
    """Steps of each participant in a round."""

    held_out: PositiveInt = 64
    """Rows that are not trained on, and scored after the last step."""

    full: bool = True
    """Measure full fine-tuning too."""

    compiled: bool = False
    """Measure ours and PEFT with torch.compile too, which takes minutes to compile on a CPU."""

    starts: Annotated[int, Field(ge=0)] = 3
    """Starts of `lorakit train` on all rows that are timed until the first step; 0: none."""

    plot: Path | None = None
    """PNG file for a bar chart, which is replaced. None: none."""

    @property
    def all_steps(self) -> int:
        """The steps of each participant, those of the warm-up included."""
        return self.steps * (WARM_UPS + self.repeats)


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

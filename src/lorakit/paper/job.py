"""A job: one cell, one task and one seed, with all settings of its run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.tasks import PREFIX, TASKS
from lorakit.errors import ConfigError, LorakitError
from lorakit.paper.cell import Cell, Part, Published, Scoring, Small, chosen, merged, tables
from lorakit.paper.settings import CellChoice

HUB_NAMES: Mapping[str, str] = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "deberta-xxlarge": "microsoft/deberta-v2-xxlarge",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
}
"""Where the paper's models are on the hub; GPT-3 is nowhere."""
OTHER_FOLDERS: Mapping[str, str] = {"e2e": "e2e_nlg", "webnlg": "web_nlg"}
"""What the folder of a task may be called too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One run of a cell."""

    cell: Cell
    scale: str
    variant: str
    model: str
    """smollm2 or minilm, or a published model."""
    task: str
    seed: int
    given: Mapping[str, Any]
    """All that the cell says of its run: `train` and `score`."""

    @property
    def hash(self) -> str:
        """Of what the cell says: by it a result is known to be of these settings."""
        text = json.dumps({"model": self.model, **self.given}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """The folder of its result, within that of all results."""
        parts = [self.cell.id, self.scale]
        parts += [self.model] if self.scale == "full" else []
        parts += [self.variant] if self.variant != "paper" else []
        return Path(".".join(parts)) / self.task

    @property
    def name(self) -> str:
        """The job, as messages name it."""
        return f"{'/'.join(self.folder.parts)}, seed {self.seed}"

    @property
    def train_split(self) -> str:
        """The split that is trained on."""
        return self.given["train_split"] or "train"

    @property
    def start(self) -> Job | None:
        """The job of another task from whose best adapter this one starts."""
        if self.given["starts_from"] is None:
            return None
        same = {"scale": self.scale, "variant": self.variant, "cells": (self.cell.id,)}
        model = self.model if self.scale == "full" else None
        of_task = {"tasks": (self.given["starts_from"],), "seeds": (self.seed,)}
        (found,) = jobs_of(CellChoice(**same, model=model, **of_task))
        return found

    @property
    def scoring(self) -> Scoring:
        """The settings of scoring."""
        return Scoring(**self.given["score"])

    def source(self, split: str, data: Path | None) -> str:
        """The source of a split's rows."""
        place = f"@{task_folder(self.task, data)}" if data else ""
        return f"{PREFIX}{self.task}:{split}{place}"

    def config(self, *, data: Path | None, out: Path) -> TrainConfig:
        """The settings of its training run.

        Args:
            data: the folder with a folder for each task; None: the hub.
            out: the folder of the run.

        Raises:
            ConfigError: they cannot be used.
        """
        train, scoring = dict(self.given["train"]), self.scoring
        rows = dict(train.pop("data", {})) | {"train": self.source(self.train_split, data)}
        if scoring.epoch == "best":
            rows["validation"] = self.source(scoring.split, data)
            rows["validation_rows"] = scoring.rows
            rows["validation_every"] = scoring.every
        if self.given["warmup_ratio"] is not None:
            train["warmup_steps"] = self._warmup(train)
        model = HUB_NAMES.get(self.model, self.model)
        return TrainConfig(**train, model=model, seed=self.seed, out=out, data=DataConfig(**rows))

    def _warmup(self, train: Mapping[str, Any]) -> int:
        """The steps of the warm-up, where it is given as a share of all."""
        rows = TASKS[self.task].splits[self.train_split].size
        per_epoch = math.ceil(rows / train["batch_size"])
        steps = train.get("steps") or math.ceil(per_epoch * train["epochs"])
        return round(self.given["warmup_ratio"] * steps)


def config_of(row: Published, cell: Cell) -> TrainConfig:
    """The settings of a published row, as far as they are the same for all of its tasks."""
    shared = tables()[cell.table].models.get(row.model)
    part = merged([tables()[cell.table], *filter(None, [shared]), cell, row])
    return TrainConfig(**part.train, model=row.model, out=Path("out"))


def task_folder(task: str, data: Path) -> Path:
    """The folder of a task within that of all."""
    other = data / OTHER_FOLDERS.get(task, task)
    return other if other.is_dir() else data / task


def jobs_of(
    settings: CellChoice, *, skip: bool = False, problems: list[str] | None = None
) -> list[Job]:
    """The jobs that settings choose, each cell's in the order of tasks and seeds.

    Args:
        settings: which.
        skip: leave out rows that cannot be run, in place of an error.
        problems: a list that takes what cannot be run, in place of an error.

    Raises:
        ConfigError: they choose nothing, or what cannot be run; every problem is listed.
    """
    found: list[Job] = []
    told, problems = problems, []
    for cell in chosen(settings.cells):
        if settings.scale == "small":
            found += _small(cell, settings)
        else:
            found += _full(cell, settings, [] if skip else problems)
    if settings.scale == "small" and (settings.model or settings.variant != "paper"):
        problems.append("model and variant are of --scale full")
    if not found and not problems and not skip:
        problems.append(f"none of these cells has a run of scale {settings.scale} and these tasks")
    problems += _unusable(found)
    if told is not None:
        told += problems
    elif problems:
        raise ConfigError.listing("these cells cannot be run so", problems)
    return found


def _small(cell: Cell, settings: CellChoice) -> Iterator[Job]:
    shared = tables()[cell.table].small or Small()
    own = cell.small
    if own is None:
        return
    for task in dict.fromkeys([*shared.tasks, *own.tasks]):
        inner = [level.tasks[task] for level in (shared, own) if task in level.tasks]
        part = merged([tables()[cell.table], shared, cell, own, *inner])
        levels = [shared, own, *inner]
        model = [level.model for level in levels if level.model][-1]
        seeds = [level.seeds for level in levels if level.seeds][-1]
        yield from _seeds(cell, model, task, part, seeds, settings)


def _full(cell: Cell, settings: CellChoice, problems: list[str]) -> Iterator[Job]:
    table = tables()[cell.table]
    rows = [row for row in cell.published if settings.model in (None, row.model)]
    if not rows and settings.model:
        models = ", ".join(dict.fromkeys(row.model for row in cell.published)) or "none"
        problems.append(f"{cell.id} has no published model {settings.model!r}; it has {models}")
    for row in rows:
        variant = row.variants.get("repository") if settings.variant == "repository" else None
        if not row.runs and variant is None:
            problems.append(
                f"{cell.id}, {row.model}: {row.note or 'its settings are not published'}"
            )
            continue
        own = [level for level in (row, variant) if level]
        levels = [*filter(None, [table.models.get(row.model)]), *own]
        for task in dict.fromkeys(task for level in own for task in level.tasks):
            inner = [level.tasks[task] for level in levels if task in level.tasks]
            part = merged([table, cell, *levels, *inner])
            yield from _seeds(cell, row.model, task, part, table.seeds, settings)


def _seeds(
    cell: Cell, model: str, task: str, part: Part, seeds: Sequence[int], settings: CellChoice
) -> Iterator[Job]:
    if settings.tasks and task not in settings.tasks:
        return
    for seed in settings.seeds or seeds:
        yield Job(
            cell=cell,
            scale=settings.scale,
            variant=settings.variant,
            model=model,
            task=task,
            seed=seed,
            given=part.model_dump(),
        )


def _unusable(jobs: Sequence[Job]) -> list[str]:
    """What is wrong with the settings of jobs."""
    problems = []
    for job in jobs:
        try:
            job.config(data=None, out=Path("out"))
        except LorakitError as error:
            problems.append(f"{job.name}: {error}")
    return problems

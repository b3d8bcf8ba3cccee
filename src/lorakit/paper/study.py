"""A study: a figure or table of section 7, which looks into the adapters of other cells' runs."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.config.base import Settings
from lorakit.config.seed import Seed
from lorakit.config.strict_yaml import read_mapping
from lorakit.errors import ConfigError
from lorakit.paper.cell import STUDIES, over
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.settings import CellChoice


class StudyRun(Settings):
    """A run that is looked into."""

    cell: str
    seed: Seed

    train: dict[str, Any] = {}
    """Settings of `lorakit train` that the cell has differently."""

    score: dict[str, Any] = {}
    """Settings of `Scoring` that the cell has differently."""

    def of(self, job: Job) -> Job:
        """A job of the cell with what differs here."""
        own = {"train": self.train, "score": self.score}
        return replace(job, given=over(job.given, own))


class Study(Settings):
    """A figure or table of section 7."""

    title: str
    """What it shows."""

    look: Literal["similarity", "amplification"]
    """What is looked for in the adapters."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """The tasks of the runs, where no others are asked for."""

    runs: dict[str, StudyRun]
    """What is looked into, by the name that it has there."""

    runs_of: dict[str, dict[str, StudyRun]] = {}
    """By task, what is looked into in their place."""

    paper: str
    """What the paper reports of GPT-3."""

    note: str
    """What a reader must know of ours."""

    published: dict[str, tuple[str, ...]] = {}
    """The paper's rows as printed, by their titles."""

    def jobs(self, settings: CellChoice, *, skip: bool = False) -> dict[str, dict[str, Job]]:
        """The jobs by task, and there by their names.

        Args:
            settings: of which scale and tasks.
            skip: no jobs, in place of an error, where the cells have not these tasks.

        Raises:
            ConfigError: a task is not one of the cells', or the scale is the paper's.
        """
        if settings.scale != "small":
            raise ConfigError("section 7 has small twins alone: the paper's adapters are of GPT-3")
        found: dict[str, dict[str, Job]] = {}
        for task in settings.tasks or self.tasks:
            for label, run in self.runs_of.get(task, self.runs).items():
                own = {"cells": (run.cell,), "seeds": (run.seed,), "tasks": (task,)}
                for job in jobs_of(settings.model_copy(update=own), skip=skip):
                    found.setdefault(task, {})[label] = run.of(job)
        return found


@cache
def studies() -> Mapping[str, Study]:
    """The figures and the table by name, in the paper's order."""
    return {name: Study(**content) for name, content in read_mapping(STUDIES).items()}


def studies_in(words: Sequence[str]) -> list[str]:
    """The names of section 7 that are among words, or that patterns among them match."""
    return [name for name in studies() if any(fnmatch.fnmatch(name, word) for word in words)]

"""The numbers of a table: of each row and column ours over the seeds, beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.paper.cell import Cell, Column, Published, Table, tables
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.results import State, state_of
from lorakit.paper.settings import CellChoice

AVERAGE = "average"
"""The column of the mean of all others."""


@dataclass(frozen=True, kw_only=True)
class SummaryEntry:
    """One number of a table: ours over the seeds, and the paper's."""

    column: Column
    over: str
    """How seeds become one number: median or mean."""
    epoch: str
    """Which evaluation counts: best or last, and by which other search."""
    states: Sequence[State]
    """What there is of each seed."""
    paper: float | None
    """In the paper's unit."""

    @cached_property
    def scores(self) -> list[float]:
        """Ours of each seed that has a result, in the paper's unit."""
        return self.at(self.epoch)

    @property
    def ours(self) -> float | None:
        """Ours over the seeds."""
        reduce = statistics.median if self.over == "median" else statistics.fmean
        return reduce(self.scores) if self.scores else None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper

    @property
    def state(self) -> str:
        """What a reader must know of it: nothing where every seed has a current result."""
        kinds = [state.kind for state in self.states]
        return ", ".join(
            kind if kinds.count(kind) == len(kinds) else f"{kinds.count(kind)} {kind}"
            for kind in ("stale", "failed", "not run")
            if kind in kinds
        )

    def at(self, epoch: str) -> list[float]:
        """The scores of an evaluation, best or last, of each seed that has it."""
        done = [state.result for state in self.states if state.kind in ("done", "stale")]
        found = [result["scores"] for result in done if result and "scores" in result]
        values = [scores[epoch][self.column.score] for scores in found if epoch in scores]
        return [value * self.column.factor for value in values if value is not None]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a table as we run it."""

    cell: Cell
    model: str
    published: Published | None
    """The paper's row that it is beside."""
    method: str
    """The method, of the paper's models as its row is called."""
    search: str = ""
    """The name of another search for answers than the row's own."""
    entries: Mapping[str, SummaryEntry]
    """By column, of those that are run."""

    @property
    def title(self) -> str:
        """The method, and the search if it is another one."""
        return f"{self.method}, {self.search}" if self.search else self.method

    @property
    def parameters(self) -> int | None:
        """Trained values without a task's head, from a result."""
        for entry in self.entries.values():
            for state in entry.states:
                if state.result is not None and state.result["status"] == "done":
                    return int(state.result["parameters"]["without_head"])
        return None

    @property
    def average(self) -> float | None:
        """The mean over the columns that are run; None where one has no number."""
        values = [entry.ours for entry in self.entries.values()]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A table as we run it."""

    name: str
    table: Table
    scale: str
    lines: Sequence[Line]

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """All results that are in it."""
        return [
            state.result
            for line in self.lines
            for entry in line.entries.values()
            for state in entry.states
            if state.result is not None
        ]


def summary(name: str, *, scale: str, results: Path) -> Summary:
    """The numbers of a table.

    Args:
        name: the table, such as table2.
        scale: small or full.
        results: the folder of results, which alone is read.
    """
    jobs = jobs_of(CellChoice(cells=(name,), scale=scale), skip=True)
    by_line: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        # A small twin may have another model for each task; of the paper's each is a row.
        by_line.setdefault((job.cell.id, job.model if scale == "full" else ""), []).append(job)
    lines = [
        _line(found, results, search)
        for found in by_line.values()
        for search in dict.fromkeys(["", *(name for job in found for name in job.scoring.also)])
    ]
    return Summary(name=name, table=tables()[name], scale=scale, lines=lines)


def _line(jobs: Sequence[Job], results: Path, search: str) -> Line:
    cell, model = jobs[0].cell, jobs[0].model
    rows = [row for row in cell.published if jobs[0].scale == "small" or row.model == model]
    published = rows[0] if rows else None
    return Line(
        cell=cell,
        model=", ".join(dict.fromkeys(job.model for job in jobs)),
        published=published,
        method=published.row if published and jobs[0].scale == "full" else cell.method,
        search=search,
        entries=dict(_entries(jobs, published, results, search)),
    )


def _entries(
    jobs: Sequence[Job], published: Published | None, results: Path, search: str
) -> Iterator[tuple[str, SummaryEntry]]:
    table = tables()[jobs[0].cell.table]
    small = jobs[0].scale == "small" and table.small
    states = {job: state_of(job, results) for job in jobs}
    for name, column in table.columns.items():
        of_column = {job: state for job, state in states.items() if job.task == column.task}
        if not of_column or column.score is None:
            continue
        job = next(iter(of_column))
        yield (
            name,
            SummaryEntry(
                column=column,
                over=small.over if small else table.over,
                epoch=f"{job.scoring.epoch}, {search}" if search else job.scoring.epoch,
                states=list(of_column.values()),
                paper=published.values.get(name) if published else None,
            ),
        )

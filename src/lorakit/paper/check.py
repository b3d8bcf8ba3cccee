"""What is checked before the first run: data, labels, scorers, commit and folders, all at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapter.output_place import check_place
from lorakit.bench.environment import uncommitted
from lorakit.config.train import DataConfig
from lorakit.data.metrics.score import check_scorer
from lorakit.data.row_types import Rows
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, LorakitError, OutputError
from lorakit.paper.job import Job
from lorakit.paper.settings import PaperRunConfig

SHOWN = 3
"""Changed files that a message names."""


@dataclass(frozen=True)
class Data:
    """The rows of jobs, each source read once."""

    folder: Path | None
    """That of all tasks; None: the hub."""
    rows: dict[tuple[Any, ...], Rows] = field(default_factory=dict)
    """By task, split, which of its rows are used, and what for."""
    _hashes: dict[int, str] = field(default_factory=dict)

    def training(self, job: Job) -> Rows:
        """The rows that a job trains on."""
        limit = job.given["train"].get("data", {}).get("train_rows")
        return self._read(job, job.train_split, limit, None, use="train")

    def scored(self, job: Job) -> Rows:
        """The rows that a job is scored on."""
        scoring = job.scoring
        return self._read(job, scoring.split, scoring.rows, scoring.every, use="test")

    def hashes(self, job: Job) -> dict[str, str]:
        """The hash of a job's rows, by what they are for."""
        return {"train": self._hash(self.training(job)), "score": self._hash(self.scored(job))}

    def _hash(self, rows: Rows) -> str:
        # Rows are kept in `rows`, so that none has the identity of others.
        if id(rows) not in self._hashes:
            self._hashes[id(rows)] = digest(rows)
        return self._hashes[id(rows)]

    def _read(
        self, job: Job, split: str, limit: int | None, every: int | None, *, use: str
    ) -> Rows:
        key = job.task, split, limit, every, use
        if key not in self.rows:
            source = job.source(split, self.folder)
            self.rows[key] = read_rows(source, DataConfig(), limit=limit, every=every, split=use)
        return self.rows[key]


def digest(rows: Rows) -> str:
    """SHA-256 of rows as the model gets them: text, labels and their order."""
    content = hashlib.sha256()
    for row in rows.rows:
        content.update(json.dumps(asdict(row), default=str).encode())
    return content.hexdigest()


def check(settings: PaperRunConfig, jobs: Sequence[Job], known: Sequence[str] = ()) -> Data:
    """Make sure that jobs can run, before the first one starts, and read their rows.

    Args:
        settings: of all of them.
        jobs: what is to be run.
        known: problems that were found before.

    Raises:
        ConfigError: something is missing or wrong; every problem is listed.
    """
    data = Data(settings.data)
    starts = [start for job in jobs if (start := job.start) is not None]
    problems = [*known, *_place_problems(settings), *_data_problems(data, [*jobs, *starts])]
    if not settings.dry_run:
        problems += _commit_problems()
    if problems:
        raise ConfigError.listing("these cells cannot be run", problems)
    return data


def _place_problems(settings: PaperRunConfig) -> Iterator[str]:
    for folder in (settings.results, settings.work):
        try:
            check_place(folder, "a folder is to be there")
        except OutputError as error:
            yield str(error)


def _data_problems(data: Data, jobs: Sequence[Job]) -> Iterator[str]:
    """What is wrong with the rows and the scorers of jobs, each problem once."""
    if data.folder is not None and not data.folder.is_dir():
        yield f"data: there is no folder {data.folder}"
        return
    reads: tuple[Callable[[Job], object], ...] = (
        data.training,
        data.scored,
        lambda job: check_scorer(job.task, job.scoring.variant),
    )
    found: dict[str, None] = {}
    for job in jobs:
        for read in reads:
            try:
                read(job)
            except LorakitError as error:
                found[str(error)] = None
    yield from found


def _commit_problems() -> Iterator[str]:
    changed = uncommitted()
    if changed:
        listed = ", ".join(changed[:SHOWN]) + (", …" if len(changed) > SHOWN else "")
        yield (
            f"{listed} {'has' if len(changed) == 1 else 'have'} uncommitted changes, so no commit"
            " would have the code that made the results: commit first"
        )


def notes(data: Data) -> Mapping[str, None]:
    """What is to be known of the rows that were read, such as other counts than published."""
    return dict.fromkeys(note for rows in data.rows.values() for note in rows.notes)

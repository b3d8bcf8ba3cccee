"""A cell: a row of the paper's tables with its settings, its published values and its small twin.

A folder of `cells/` is a table: `table.yaml` has what its rows share, and each other file is a row,
called as the table and the file, table2.lora, or several that differ in a size: table6.q-8.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.config.base import PositiveInt, Settings
from lorakit.config.seed import Seed
from lorakit.config.strict_yaml import read_mapping
from lorakit.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parent / "cells"
STUDIES = Path(__file__).parent / "studies.yaml"
"""The file of section 7's figures and table, which look into runs of cells."""
SHARED = "table"
"""The file of a table's folder that is no row."""
Reason = Literal["scale", "data", "text", "decoding"]
"""Why ours differs from the paper's value. scale: another model, fewer steps or rows; data: other
rows or splits; text: another convention of the texts; decoding: another search for answers."""


class Part(Settings):
    """Settings of runs, as far as one level gives them: a table, a row, a model or a task."""

    train: dict[str, Any] = {}
    """Settings of `lorakit train`."""

    score: dict[str, Any] = {}
    """Settings of `Scoring`."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The warm-up as a share of the steps."""

    train_split: str | None = None
    """The split of the task that is trained on. None: train."""

    starts_from: str | None = None
    """The task from whose run, of the same cell and seed, training starts, with a fresh head. None:
    it starts from the model alone."""


class PartOfTasks(Part):
    """The same, and what tasks have beside it."""

    tasks: dict[str, Part] = {}
    """By the task's name."""


class Scoring(Settings):
    """What is scored after training."""

    split: str = "validation"
    """The split of the task."""

    rows: PositiveInt | None = None
    """Only its first so many rows. None: all."""

    every: PositiveInt | None = None
    """Of these only each so many-th: where a file's rows are in an order. None: all."""

    epoch: Literal["best", "last"] = "best"
    """Which evaluation counts: the best one of the run, or that at its end."""

    variant: str | None = None
    """Of the scorer, as `lorakit score` has it."""

    batch_size: PositiveInt = 64
    """Rows at once."""

    answers: dict[str, Any] = {}
    """Of texts, settings of `lorakit evaluate` for the search, such as max_new_tokens and
    num_beams."""

    also: dict[str, dict[str, Any]] = {}
    """Other searches, by name, whose answers are scored too."""


class Column(Settings):
    """One column of a table."""

    title: str
    """As printed."""

    task: str
    """The task, as `task:NAME` has it."""

    score: str | None
    """The score, as `lorakit score` calls it. null: it has none."""

    factor: float = 1.0
    """By what ours is multiplied to be in the paper's unit."""

    digits: Annotated[int, Field(ge=0)] = 1
    """Decimals, as printed."""

    def shown(self, score: float | None) -> str:
        """A score in the paper's unit; "none" where it does not exist."""
        return "none" if score is None else f"{score * self.factor:.{self.digits}f}"


class SmallTask(Part):
    """One task of a small twin."""

    model: str | None = None
    """smollm2 or minilm. None: that of the twin."""

    seeds: tuple[Seed, ...] = ()
    """None: those of the twin."""


class Small(SmallTask):
    """The small twin of a table or a row: a packaged model, fewer steps and rows.

    What a row says replaces what its table says.
    """

    tasks: dict[str, SmallTask] = {}
    """What tasks have beside it, by name."""

    over: Literal["median", "mean"] = "median"
    """How the seeds' scores become one."""

    reasons: tuple[Reason, ...] = ("scale",)
    """Why its scores differ from the paper's."""


class Table(Part):
    """What the rows of one of the paper's tables share."""

    title: str
    """What it shows."""

    rows: tuple[str, ...]
    """Its files of rows, in the paper's order."""

    columns: dict[str, Column]
    """Its columns, by a short name."""

    average: bool = False
    """Whether the mean of the columns is a column too."""

    seeds: tuple[Seed, ...]
    """Seeds of the paper's scale."""

    over: Literal["median", "mean"]
    """How the paper makes one number of its seeds."""

    models: dict[str, PartOfTasks] = {}
    """What all rows of a published model share."""

    beside: str | None = None
    """Of a figure, the table whose rows are the paper's points."""

    small: Small | None = None
    """None: it has no small twin."""


class Published(PartOfTasks):
    """A row as the paper prints it, for one model."""

    model: str
    """As in `paper/shapes.py`."""

    row: str
    """The method, as printed."""

    printed: str
    """Trained parameters, as printed."""

    counted: int | None = None
    """Trained parameters by our count, without a task's head. None: its sizes are not published."""

    values: dict[str, float | None]
    """By column; null where no value is known."""

    spread: dict[str, float] = {}
    """The printed ± of a value."""

    source: str
    """Where the values are from."""

    runs: bool = True
    """Whether its settings are known, so that it can be run."""

    variants: dict[Literal["repository"], PartOfTasks] = {}
    """What differs in the settings of the paper's repository."""

    note: str | None = None
    """What a reader must know."""


class Cell(Part):
    """A row: a method, the published rows of each model, and the small twin."""

    id: str
    """Table and row: table2.lora."""

    method: str
    """The method's name in our tables."""

    published: tuple[Published, ...] = ()
    """Empty: a row that the paper has not, beside its own."""

    small: Small | None = None
    """None: there is no small twin."""

    @property
    def table(self) -> str:
        """The table that it is a row of."""
        return self.id.partition(".")[0]


@cache
def tables() -> Mapping[str, Table]:
    """The tables by name, in the paper's order."""
    folders = sorted(FOLDER.iterdir(), key=_order)
    return {one.name: Table(**read_mapping(one / f"{SHARED}.yaml")) for one in folders}


@cache
def cells() -> Mapping[str, Cell]:
    """The cells by id, in the paper's order."""
    return {
        cell.id: cell
        for name, table in tables().items()
        for row in table.rows
        for cell in _in_file(f"{name}.{row}", read_mapping(FOLDER / name / f"{row}.yaml"))
    }


def _in_file(name: str, content: dict[str, Any]) -> Iterator[Cell]:
    """The cell of a file, or one for each of its `sizes`, which differ from the file in a part."""
    sizes = content.pop("sizes", None)
    if sizes is None:
        yield Cell(id=name, **content)
    for size, own in (sizes or {}).items():
        yield Cell(id=f"{name}-{size}", **over(content, own))


def chosen(words: Sequence[str]) -> list[Cell]:
    """The cells that words name: ids, tables, or patterns of either; all where there are none.

    Raises:
        ConfigError: a word names none; every such word is listed.
    """
    known = cells()
    unknown = [word for word in words if not any(_named(word, name) for name in known)]
    if unknown:
        names = [*known, *tables()]
        problems = [f"there is no cell {word!r}{did_you_mean(word, names)}" for word in unknown]
        raise ConfigError.listing("cells (`lorakit paper list` shows all)", problems)
    return [
        cell
        for name, cell in known.items()
        if not words or any(_named(word, name) for word in words)
    ]


def names_nothing(words: Sequence[str]) -> list[tuple[str, str]]:
    """The words that name neither a cell nor a table nor a part of section 7.

    Returns:
        Each with the end of a message, which names the nearest that there is.
    """
    names = [*cells(), *tables(), *read_mapping(STUDIES)]
    return [
        (word, did_you_mean(word, names))
        for word in words
        if not any(_named(word, name) for name in names)
    ]


def merged(parts: Iterable[Part]) -> Part:
    """Several levels as one; a later one overrides, in sections setting by setting."""
    train: dict[str, Any] = {}
    score: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for part in parts:
        train, score = over(train, part.train), over(score, part.score)
        given = part.model_dump(include={"warmup_ratio", "train_split", "starts_from"})
        single |= {name: value for name, value in given.items() if value is not None}
    return Part(train=train, score=score, **single)


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them, in sections setting by setting."""
    both = dict(below)
    for name, value in above.items():
        known = both.get(name)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            value = over(known, value)
        both[name] = value
    return both


def _named(word: str, name: str) -> bool:
    return fnmatch.fnmatch(name, word) or fnmatch.fnmatch(name, f"{word}.*")


def _order(folder: Path) -> tuple[int, str]:
    return int("".join(filter(str.isdigit, folder.name))), folder.name

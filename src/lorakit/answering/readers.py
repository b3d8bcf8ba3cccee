"""What answers rows, adapters with heads or a base with one, and which rows each is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.hub import short_names
from lorakit.config.answering import PredictConfig
from lorakit.config.train import DataConfig
from lorakit.data.file_formats import RawRow
from lorakit.data.labels import head_classes
from lorakit.data.objectives import OBJECTIVES
from lorakit.data.objectives.objective import Objective
from lorakit.data.problems import Problems
from lorakit.data.row_types import Rows
from lorakit.data.rows_to_answer import rows_to_answer
from lorakit.data.sources import read_raw_rows
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.models.load import own_classes, own_task
from lorakit.models.tasks import TASKS, has_classes

COLUMN = "adapter"
"""The column of a row that names the adapter which is to answer it."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What answers rows: an adapter with its head, or the base."""

    name: str | None
    adapter: Adapter | None
    task: str
    labels: tuple[str, ...] | None
    data: DataConfig
    may_answer_nothing: bool
    """Whether the answer to a question may be that there is none."""

    @property
    def objective(self) -> Objective:
        """What its task makes of rows."""
        return OBJECTIVES[self.task]

    @property
    def width(self) -> int | None:
        """The numbers that it says of a row or token; None: all of them, whatever their number."""
        return len(self.labels) if self.labels else 1 if self.task == "regression" else None


@dataclass(frozen=True, kw_only=True)
class AskedRows:
    """The rows that one reader is asked, and their numbers in the source."""

    reader: Reader
    numbers: tuple[int, ...]
    raw: tuple[RawRow, ...]
    rows: Rows


def readers_of(config: PredictConfig) -> tuple[str, list[Reader]]:
    """The base's name, and what answers.

    Raises:
        ConfigError: they cannot be asked together.
        AdapterFileError: an adapter's files are unusable, or name no base.
    """
    names = short_names(config.adapters)
    adapters = [Adapter.load(place) for place in config.adapters]
    base = config.model or (adapters[0].base_name if adapters else "") or ""
    if not base and not adapters:
        raise ConfigError("give adapters, a model, or both")
    if not base:
        raise AdapterFileError(
            f"{names[0]} does not say which base it was trained on: name the model"
        )
    pairs = zip(names, adapters, strict=True)
    readers = [_reader(config, base, name, adapter) for name, adapter in pairs]
    readers = readers or [_reader(config, base, None, None)]
    _check_together(readers, base)
    return base, readers


def _reader(config: PredictConfig, base: str, name: str | None, adapter: Adapter | None) -> Reader:
    use = TrainedUse.on(adapter.card if adapter else {})
    task = config.task or use.task or own_task(base)
    given = config.data
    data = use.data.model_copy(update={k: getattr(given, k) for k in given.model_fields_set})
    labels = None
    if has_classes(task):
        own = use.labels or own_classes(base, task)
        labels = head_classes(given.labels, own, whose=name or base)
        if labels is None:
            raise ConfigError(
                f"{name or base} does not say what its classes are called: list them in data.labels"
            )
    nothing = config.may_answer_nothing
    return Reader(
        name=name,
        adapter=adapter,
        task=task,
        labels=labels,
        data=data,
        may_answer_nothing=use.may_answer_nothing if nothing is None else nothing,
    )


def _check_together(readers: Sequence[Reader], base: str) -> None:
    """Make sure that one model can answer for all.

    Raises:
        ConfigError: one writes texts, or they need models of different forms.
    """
    if any(each.name is None and each.task not in OBJECTIVES for each in readers):
        raise ConfigError(
            f"{base} has no trained head that gives labels, and no adapter brings one: name an "
            "adapter that was trained for labels; what writes texts is asked by `lorakit generate`"
        )
    writing = [each.name for each in readers if each.name and each.task not in OBJECTIVES]
    if writing:
        raise ConfigError(
            f"{', '.join(writing)} {'write' if writing[1:] else 'writes'} texts, and has no labels"
            " to predict: `lorakit generate` has them answer"
        )
    if len({TASKS[each.task].auto_class for each in readers}) > 1:
        lines = [f"{each.name}: {each.task}" for each in readers]
        raise ConfigError.listing(
            "these adapters need heads of different forms: ask them one after the other", lines
        )


def rows_asked(config: PredictConfig, readers: Sequence[Reader]) -> list[AskedRows]:
    """The rows for each reader that has some.

    Raises:
        DataError: rows cannot be used, or name adapters that are not there.
    """
    found = read_raw_rows(config.input, limit=None, split="test", delimiter=config.data.delimiter)
    asked = []
    for reader, numbers in zip(readers, _numbers(config.input, found.rows, readers), strict=True):
        if not numbers:
            continue
        raw = [_without_choice(found.rows[number]) for number in numbers]
        rows = rows_to_answer(config.input, raw, reader.data, reader.objective, reader.labels)
        if reader.may_answer_nothing:
            rows = replace(rows, rows=tuple(reader.objective.without_answers(rows.rows)))
        rows = replace(rows, notes=found.notes)
        asked.append(AskedRows(reader=reader, numbers=tuple(numbers), raw=tuple(raw), rows=rows))
    return asked


def _without_choice(row: RawRow) -> RawRow:
    return replace(row, values={k: v for k, v in row.values.items() if k != COLUMN})


def _numbers(source: str, raw: Sequence[RawRow], readers: Sequence[Reader]) -> list[list[int]]:
    """The numbers of the rows that each reader is to answer.

    Raises:
        DataError: a row names an adapter that is not there.
    """
    names = [reader.name for reader in readers]
    problems = Problems(source)
    found: list[list[int]] = [[] for _ in readers]
    for number, each in enumerate(raw):
        choice = each.values.get(COLUMN)
        if choice is not None and choice not in names:
            problems.add(each.where, f"{COLUMN} is {choice!r}; there are {_listed(names)}")
        for own, name in zip(found, names, strict=True):
            if choice in (None, name):
                own.append(number)
    problems.raise_if_any()
    return found


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(name for name in names if name) or "none, the base alone"

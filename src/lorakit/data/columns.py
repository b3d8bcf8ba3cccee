"""The columns of one source: which of lorakit's fields they give, and so which type of row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from lorakit.config.rows import RowField, RowType
from lorakit.config.train import DataConfig
from lorakit.data.fields import FieldMap
from lorakit.data.file_formats import RawRow
from lorakit.data.objectives import BY_KIND, OBJECTIVES
from lorakit.data.problems import Problems, UnusableRowError
from lorakit.errors import DataError

R = TypeVar("R")
Values: TypeAlias = dict[str, Any]
"""The values of a raw row by column."""

_NEEDED: dict[RowType, tuple[RowField, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    **{kind: each.needed for kind, each in BY_KIND.items()},
    "text": ("text",),
}
"""The fields that each type of row needs; `auto` is the first type whose fields are all there."""

_OPTIONAL: dict[RowType, tuple[RowField, ...]] = {
    "messages": ("tools",),
    "prompt": ("references",),
    **{kind: each.optional for kind, each in BY_KIND.items()},
    "text": (),
}
"""The fields that rows of a type may have besides."""

_ANSWERS: tuple[RowField, ...] = ("completion", "references")


@dataclass(frozen=True)
class ColumnTable:
    """The raw rows of a source, and the map from lorakit's fields to their columns."""

    source: str
    raw: Sequence[RawRow]
    fields: FieldMap

    @classmethod
    def of(cls, source: str, raw: Sequence[RawRow], data: DataConfig) -> ColumnTable:
        """The table of a source, with the map that its settings and its columns give."""
        return cls(source, raw, FieldMap.of(data.fields, _columns(raw)))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that occur in any raw row."""
        return _columns(self.raw)

    def remarks(self, kind: RowType, *more: RowField) -> tuple[str, ...]:
        """How the columns are read as rows of a type, and which are not read at all.

        Args:
            kind: the type of row.
            more: further fields that are read.
        """
        fields = (*_NEEDED[kind], *_OPTIONAL[kind], *more)
        columns = self.columns
        read = {column for name in fields for column in self.fields.columns(name, columns)}
        left = [column or "(no name)" for column in columns if column not in read]
        unread = (f"columns that are not read: {', '.join(left)}",) if left else ()
        return (*(self.fields.notes[name] for name in fields if name in self.fields.notes), *unread)

    def rows(self, make: Callable[[Values], R]) -> tuple[R, ...]:
        """The rows that a function makes of the raw rows, in their order.

        Raises:
            DataError: the function raised UnusableRowError; lists those raw rows.
        """
        problems = Problems(self.source)
        rows = []
        for each in self.raw:
            try:
                rows.append(make(each.values))
            except UnusableRowError as error:
                problems.add(each.where, str(error))
        problems.raise_if_any()
        return tuple(rows)

    def kind(self, data: DataConfig, *, task: str | None = None, answered: bool) -> RowType:
        """The type of the rows: the configured format, or the first that the columns can give.

        Args:
            data: the format, and the columns that the user named.
            task: what the rows are for; the type that it needs is tried first.
            answered: prompt rows need a completion or references.

        Raises:
            DataError: a needed or named column is not there; says which are.
        """
        columns = self.columns
        first = () if task is None or task not in OBJECTIVES else (OBJECTIVES[task].kind,)
        every = tuple(dict.fromkeys((*first, *_NEEDED)))
        kinds = every if data.format == "auto" else (data.format,)
        lacking = {kind: self._lacking(kind, columns, answered=answered) for kind in kinds}
        fitting = [kind for kind in kinds if not lacking[kind]]
        problems = self._mistaken(data, columns)
        if fitting and not problems:
            return fitting[0]
        if not problems and len(kinds) == 1:
            problems = lacking[kinds[0]]
        elif not problems:
            problems = [f"{kind} rows need {' and '.join(_NEEDED[kind])}" for kind in kinds]
        raise self._lack(problems, _NEEDED["prompt" if data.format == "auto" else data.format])

    def check(self, needed: Sequence[RowField]) -> None:
        """Make sure that fields have columns.

        Raises:
            DataError: some have not; says which.
        """
        problems = self._absent(needed, self.columns)
        if problems:
            raise self._lack(problems, needed)

    def _lack(self, problems: Sequence[str], needed: Sequence[RowField]) -> DataError:
        example = ", ".join(f"{name}: COLUMN" for name in needed)
        lines = "\n  ".join([f"{self.source} lacks fields that are needed:", *problems])
        return DataError(
            f"{lines}\nIts columns are {', '.join(self.columns) or 'none'}."
            f" Say in data.fields which is which, as in fields: {{{example}}} in YAML, or"
            f" --data.fields '{{{example}}}'."
        )

    def _lacking(self, kind: RowType, columns: Sequence[str], *, answered: bool) -> list[str]:
        """A line for each column that rows of this type need and that is not there."""
        optional = not answered or not self.fields.absent("references", columns)
        needed = [name for name in _NEEDED[kind] if not (name == "completion" and optional)]
        return self._absent(needed, columns)

    def _mistaken(self, data: DataConfig, columns: Sequence[str]) -> list[str]:
        """A line for each column that the user named and that is not there.

        Under one setting, training files often have a completion and test files references: of
        these two, one may be absent.
        """
        has_answer = not all(self.fields.absent(name, columns) for name in _ANSWERS)
        named = [name for name in data.fields if not (has_answer and name in _ANSWERS)]
        return self._absent(named, columns)

    def _absent(self, names: Sequence[RowField], columns: Sequence[str]) -> list[str]:
        return [
            f"{name}: there is no column {column}"
            for name in names
            for column in self.fields.absent(name, columns)
        ]


def _columns(raw: Sequence[RawRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for each in raw for column in each.values))

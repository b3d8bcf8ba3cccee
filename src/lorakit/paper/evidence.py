"""Evidence for a claim of the paper: comparisons of our results, each of which holds or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.config.base import Settings
from lorakit.errors import DataError
from lorakit.paper.cell import cells
from lorakit.paper.shapes import all_parameters
from lorakit.paper.summary import AVERAGE, Line, summary


@dataclass(frozen=True)
class Found:
    """One comparison."""

    text: str
    holds: bool | None
    """None: something of it was not measured yet."""


@dataclass(frozen=True)
class Sources:
    """Where evidence is read, each table once."""

    results: Path
    """The folder of the cells' results."""
    benchmarks: Path
    """The folder of the benchmarks' results."""
    _lines: dict[str, dict[str, Line]] = field(default_factory=dict)

    def line(self, cell: str) -> Line:
        """The small twin of a cell."""
        table = cells()[cell].table
        if table not in self._lines:
            lines = summary(table, scale="small", results=self.results).lines
            self._lines[table] = {line.cell.id: line for line in lines if not line.search}
        return self._lines[table][cell]

    def value(self, file: str, path: Sequence[str | int]) -> float | None:
        """A value of a benchmark's result, or of section 7's; None: there is no such file.

        Raises:
            DataError: the file has not this value.
        """
        places = (self.benchmarks / file, self.results / file)
        place = next(filter(Path.is_file, places), None)
        if place is None:
            return None
        try:
            found: Any = json.loads(place.read_text(encoding="utf-8"))
            for step in path:
                found = found[step]
            return float(found)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{place} has no {' '.join(map(str, path))}: {error!r}.") from error


class Versus(Settings):
    """A cell beside another: in each column as good, but for a margin."""

    kind: Literal["versus"]
    cell: str
    """The one that is to be as good."""
    than: str
    """The other."""
    columns: tuple[str, ...] = ()
    """None: all that both have."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """How much less still counts, in the unit of the table."""

    def found(self, sources: Sources) -> Iterator[Found]:
        """A comparison for each column."""
        ours, other = sources.line(self.cell), sources.line(self.than)
        for name, entry in ours.entries.items():
            beside = other.entries.get(name)
            if beside is None or (self.columns and name not in self.columns):
                continue
            title, digits = entry.column.title, entry.column.digits
            what = f"{self.cell} beside {self.than}, {title}"
            if entry.ours is None or beside.ours is None:
                yield Found(f"{what}: not measured", None)
                continue
            leave = f", with {self.margin:g} of leave" if self.margin else ""
            yield Found(
                f"{what}: {entry.ours:.{digits}f} and {beside.ours:.{digits}f}{leave}",
                entry.ours >= beside.ours - self.margin,
            )


class Peak(Settings):
    """Cells from small to large, of which the largest is not the best."""

    kind: Literal["peak"]
    cells: Annotated[tuple[str, ...], Field(min_length=2)]
    """In order of size."""
    column: str
    """The column that is compared."""

    def found(self, sources: Sources) -> Iterator[Found]:
        """One comparison."""
        entries = [sources.line(cell).entries[self.column] for cell in self.cells]
        what = f"{self.cells[0]} to {self.cells[-1]}"
        scores = [entry.ours for entry in entries if entry.ours is not None]
        if len(scores) < len(entries):
            yield Found(f"{what}: {len(scores)} of {len(entries)} sizes measured", None)
            return
        listed = ", ".join(f"{score:.{entries[0].column.digits}f}" for score in scores)
        yield Found(f"{what}: {listed}", max(scores) > scores[-1])


class BenchFigure(Settings):
    """A figure of a benchmark, or of section 7, beside a limit."""

    kind: Literal["measured"]
    what: str
    """What was measured."""
    file: str
    """The benchmark's result, or section 7's: figure3.small/sst2.json."""
    value: tuple[str | int, ...]
    """The path of the figure in it."""
    over: tuple[str | int, ...] = ()
    """The path of another figure, by which it is divided."""
    at_most: float | None = None
    """The largest figure with which the claim holds."""
    at_least: float | None = None
    """The least one."""
    unit: str
    """What the figure counts."""

    def found(self, sources: Sources) -> Iterator[Found]:
        """One comparison."""
        value = sources.value(self.file, self.value)
        divisor = sources.value(self.file, self.over) if self.over else 1.0
        if value is None or divisor is None:
            yield Found(f"{self.what}: not measured yet ({self.file})", None)
            return
        got = value / divisor
        least = -float("inf") if self.at_least is None else self.at_least
        most = float("inf") if self.at_most is None else self.at_most
        limit = f"at most {most:g}" if self.at_least is None else f"at least {least:g}"
        text = f"{self.what}: {got:.2f} {self.unit}, {limit} ({self.file})"
        yield Found(text, least <= got <= most)


class Counted(Settings):
    """All parameters of a published model over those that a cell trains."""

    kind: Literal["counted"]
    cell: str
    """Its first published row is counted."""
    at_least: float
    """The least ratio with which the claim holds."""

    def found(self, sources: Sources) -> Iterator[Found]:
        """One comparison."""
        row = cells()[self.cell].published[0]
        assert row.counted is not None
        ratio = all_parameters(row.model) / row.counted
        text = f"{row.row} on {row.model}: a {ratio:,.0f}th, at least {self.at_least:,.0f}"
        yield Found(f"{text} (by counting)", ratio >= self.at_least)


class ShownByTest(Settings):
    """What a test of the repository shows at each run."""

    kind: Literal["tested"]
    what: str
    """What is shown."""
    test: str
    """The file and the name."""

    def found(self, sources: Sources) -> Iterator[Found]:
        """One finding."""
        yield Found(f"{self.what} ({self.test})", True)


Evidence = Versus | Peak | BenchFigure | Counted | ShownByTest


class Headline(Settings):
    """A number of README's table."""

    cell: str
    column: str
    """A column of its table, or average."""

    def values(self, sources: Sources) -> Mapping[str, float | None]:
        """Ours and the paper's; of the average both over the columns that ours has."""
        line = sources.line(self.cell)
        if self.column != AVERAGE:
            entry = line.entries[self.column]
            return {"ours": entry.ours, "paper": entry.paper}
        papers = [entry.paper for entry in line.entries.values()]
        known = [value for value in papers if value is not None]
        whole = known and len(known) == len(papers)
        return {"ours": line.average, "paper": fmean(known) if whole else None}

    def state(self, sources: Sources) -> str:
        """What a reader must know of ours, such as that a part is stale."""
        entries = sources.line(self.cell).entries
        asked = entries.values() if self.column == AVERAGE else [entries[self.column]]
        return ", ".join(dict.fromkeys(entry.state for entry in asked if entry.state))

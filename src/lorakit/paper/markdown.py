"""A table as Markdown: ours, the paper's, and every number of ours beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit.paper.cell import Published, cells
from lorakit.paper.shapes import GPT3
from lorakit.paper.summary import AVERAGE, Line, Summary, SummaryEntry

NOTHING = "–"
"""Where there is no number."""
BYTES_OF_WEIGHT = 2
"""Bytes of a value in a checkpoint of 16 bits, which the paper's sizes are of."""
BYTES_OF_ADAM = 8
"""Bytes of Adam's two moments of a trained value, in 32 bits each."""


def markdown(summary: Summary) -> str:
    """The whole page of a table."""
    title = f"# {heading(summary.name)}: {summary.table.title}"
    parts = [title, *_ours(summary), "## The paper's", paper_table(summary)]
    if any(entry.scores for line in summary.lines for entry in line.entries.values()):
        parts += ["## Beside each other", *_beside(summary)]
    return "\n\n".join(parts) + "\n"


def heading(name: str) -> str:
    """The name of a table or figure as a title: Table 2."""
    digits = "".join(filter(str.isdigit, name))
    return f"{name.removesuffix(digits).capitalize()} {digits}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; all columns but the first are to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, marks, *rows])


def _ours(summary: Summary) -> Iterator[str]:
    if not summary.lines:
        yield f"No run of scale {summary.scale} is planned."
        return
    yield f"## Ours, {summary.scale}"
    yield _made_with(summary)
    yield ours_table(summary)


def ours_table(summary: Summary) -> str:
    """Ours: a row for each method, a column for each number."""
    columns, averages = summary.table.columns, summary.table.average
    run = {name for line in summary.lines for name in line.entries}
    shown = [name for name in columns if name in run]
    head = ["", "trained", *(columns[name].title for name in shown)]
    rows = [
        [
            line.title,
            millions(line.parameters),
            *(_with_state(line.entries.get(name)) for name in shown),
            *([number(line.average, 1)] if averages else []),
        ]
        for line in summary.lines
    ]
    return grid([*head, *(["mean"] if averages else [])], rows)


def _with_state(entry: SummaryEntry | None) -> str:
    """A number, and in brackets what a reader must know of it."""
    if entry is None:
        return NOTHING
    state = f"({entry.state})" if entry.state else ""
    if entry.ours is None:
        return state.strip("()") or NOTHING
    return f"{number(entry.ours, entry.column.digits)} {state}".strip()


def paper_table(summary: Summary) -> str:
    """The paper's rows, with the trained parameters as printed and by our count."""
    columns = dict(summary.table.columns)
    averages = [AVERAGE] if summary.table.average else []
    head = ["", "printed", "our count", *(c.title for c in columns.values()), *averages]
    published = [
        row for cell in cells().values() if cell.table == summary.name for row in cell.published
    ]
    if not published:
        return "The paper has no such rows."
    digits = {name: column.digits for name, column in columns.items()} | {AVERAGE: 1}
    rows = [
        [
            row.row,
            row.printed,
            millions(row.counted),
            *(_of_paper(row, name, digits[name]) for name in [*columns, *averages]),
            row.source,
        ]
        for row in published
    ]
    notes = [f"- {row.row}: {row.note}" for row in published if row.note and row.runs]
    accounts = [row for row in published if row.model == GPT3 and row.counted]
    parts = [grid([*head, "source"], rows), "\n".join(notes), _accounts(accounts)]
    return "\n\n".join(part for part in parts if part)


def _of_paper(row: Published, column: str, digits: int) -> str:
    spread = f" ± {row.spread[column]:g}" if column in row.spread else ""
    return number(row.values.get(column), digits) + spread


def _accounts(rows: Sequence[Published]) -> str:
    """What GPT-3's rows take, by our counts; nobody outside can run them."""
    if not rows:
        return ""
    counted = [(row.row, row.counted) for row in rows if row.counted]
    lines = [
        [
            name,
            millions(count),
            f"{count * BYTES_OF_WEIGHT / 1e6:,.1f} MB",
            f"{count * BYTES_OF_ADAM / 1e6:,.1f} MB",
        ]
        for name, count in counted
    ]
    return grid(["GPT-3, by our count", "trained", "checkpoint, 16 bits", "Adam's moments"], lines)


def _beside(summary: Summary) -> Iterator[str]:
    head = ["", "number", "seeds", "ours", "mean ± s.d.", "best", "last", "paper", "difference"]
    entries = [(line, each) for line in summary.lines for each in line.entries.values()]
    yield grid(head, [_row(line, each) for line, each in entries if each.scores])
    small = summary.table.small
    reasons = small.reasons if summary.scale == "small" and small else ()
    if reasons:
        yield "Why they differ: " + "; ".join(f"**{r}**, {REASONS[r]}" for r in reasons) + "."


REASONS = {
    "scale": "another, smaller model, trained for fewer steps",
    "data": "fewer rows for training or scoring than published",
    "text": "official references, where the paper's are tokenised",
    "decoding": "greedy answers, where the paper's are of a beam of 10",
}
"""What the code of a reason means."""


def _row(line: Line, entry: SummaryEntry) -> list[str]:
    digits, scores = entry.column.digits, entry.scores
    spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
    mean = number(statistics.fmean(scores), digits) + spread if scores else NOTHING
    best, last = (entry.at(epoch) for epoch in ("best", "last"))
    difference = entry.difference
    return [
        line.title,
        entry.column.title,
        str(len(scores)),
        _with_state(entry),
        mean,
        number(statistics.median(best), digits) if best else NOTHING,
        number(statistics.median(last), digits) if last else NOTHING,
        number(entry.paper, digits) + (f" ({line.published.row})" if line.published else ""),
        NOTHING if difference is None else f"{difference:+.{digits}f}",
    ]


def _made_with(summary: Summary) -> str:
    """How ours were made: models, seeds, commits, hardware."""
    results = summary.results
    if not results:
        return f"Not run yet: `lorakit paper run {summary.name} --scale {summary.scale}`."
    first = summary.lines[0].entries
    entry = next(iter(first.values()))
    told: Mapping[str, Any] = {
        "model": _each(r["model"] for r in results),
        "seeds": _each(str(r["seed"]) for r in results),
        "commit": _each(str(r["commit"]) for r in results),
        "on": _each(
            f"{r['hardware']['gpu'] or r['hardware']['processor']},"
            f" {r['hardware']['threads']} thread(s)"
            for r in results
        ),
    }
    listed = "; ".join(f"{name} {value}" for name, value in told.items())
    return (
        f"{entry.over.capitalize()} over seeds, {entry.epoch} evaluation; {listed}."
        f" Rebuilt by `lorakit paper run {summary.name} --scale {summary.scale}`."
    )


def _each(values: Iterator[str]) -> str:
    return ", ".join(sorted(set(values)))


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def millions(count: int | None) -> str:
    """A number of parameters: 0.295M, 1.25M, 174.6B."""
    if count is None:
        return NOTHING
    if count >= 1e9:
        return f"{count / 1e9:,.1f}B"
    return f"{count / 1e6:,.{2 if count >= 1e6 else 3}f}M"

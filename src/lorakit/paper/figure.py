"""Figure 2: the score of each method against how many values it trains, the paper's and ours."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapter.atomic_write import write_files
from lorakit.errors import MissingExtraError
from lorakit.paper.cell import cells, tables
from lorakit.paper.markdown import grid, heading, millions, number
from lorakit.paper.summary import summary

COLOURS: Mapping[str, str] = {
    "LoRA": "#1d63c1",
    "Adapter^H": "#d9822b",
    "Adapter^P": "#b3541e",
    "PreEmbed": "#7a9e3f",
    "PreLayer": "#3f7a4e",
    "BitFit": "#8a5aa8",
    "FT": "#7a828c",
    "FT of the top blocks": "#7a828c",
}
"""The colour of each method, in every panel."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run, or one row of the paper."""

    panel: str
    method: str
    parameters: int
    """Trained values."""
    score: float
    """In per cent."""


def points(name: str, results: Path) -> list[Point]:
    """The points of a figure: the paper's, and ours as far as there are results.

    Args:
        name: figure2.
        results: the folder of results.
    """
    return [*_papers(name), *_ours(name, results)]


def _papers(name: str) -> Iterator[Point]:
    table = tables()[name].beside
    for column in tables()[name].columns.values():
        same = [
            other
            for other, one in tables()[table or name].columns.items()
            if (one.task, one.score) == (column.task, column.score)
        ]
        for cell in cells().values():
            for row in cell.published if cell.table == table else ():
                value = row.values.get(same[0]) if same else None
                count = row.counted or _printed(row.printed)
                if value is not None and count:
                    yield Point(
                        panel=f"the paper, GPT-3 175B, {column.title}",
                        method=cell.method.partition(",")[0],
                        parameters=count,
                        score=value,
                    )


def _printed(text: str) -> int | None:
    """A printed number of parameters such as 20.2M."""
    number, millions, _ = text.replace(",", "").partition("M")
    return round(float(number) * 1e6) if millions else None


def _ours(name: str, results: Path) -> Iterator[Point]:
    found = summary(name, scale="small", results=results)
    for line in found.lines:
        for entry in line.entries.values():
            if entry.ours is not None and line.parameters:
                yield Point(
                    panel=f"ours, {line.model}, {entry.column.title}",
                    method=line.cell.method,
                    parameters=line.parameters,
                    score=entry.ours,
                )


def points_table(found: Sequence[Point], name: str) -> str:
    """The points as a table of Markdown."""
    rows = [
        [point.panel, point.method, millions(point.parameters), number(point.score, 1)]
        for point in found
    ]
    head = ["panel", "method", "trained", "score"]
    return f"# {heading(name)}: {tables()[name].title}\n\n{grid(head, rows)}\n"


def draw(found: Sequence[Point], name: str, folder: Path) -> list[Path]:
    """Draw the figure as PNG and SVG.

    Args:
        found: its points.
        name: figure2.
        folder: where the files are written; earlier ones are replaced.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the files cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a figure", "plots")
    # Imported when needed: it is optional, and slow to import. Without a salt and a date the same
    # points give the same SVG.
    from matplotlib import rc_context

    files: dict[str, bytes] = {}
    with rc_context({"svg.hashsalt": name}):
        figure = _figure(found, tables()[name].title)
        for kind in ("png", "svg"):
            content = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(content, format=kind, metadata=metadata)
            files[f"{name}.small.{kind}"] = content.getvalue()
    write_files(folder, files, overwrite=True)
    return [folder / file for file in files]


def _figure(found: Sequence[Point], title: str) -> Any:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(point.panel for point in found))
    figure = Figure(figsize=(1 + 4.2 * len(panels), 3.6), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        of_panel = [point for point in found if point.panel == panel]
        for method in dict.fromkeys(point.method for point in of_panel):
            line = sorted((p.parameters, p.score) for p in of_panel if p.method == method)
            counts, scores = zip(*line, strict=True)
            colour = COLOURS.get(method)
            axes.plot(counts, scores, "o-", label=method, color=colour, markersize=4)
        axes.set_xscale("log")
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel("trained parameters", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    return figure

"""The plot of a sweep: score against trained parameters, the shape of the paper's Figure 2."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.training.sweep.grid import label

RANK = "lora.rank"
MOST_LINES_NAMED = 12
"""With more lines than this, the legend would be larger than the plot."""


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """One adapter."""

    settings: Mapping[str, Any]
    """Its values of the settings that vary."""
    parameters: int
    score: float


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(points: Sequence[TrialPoint], file: Path, *, score_name: str, title: str) -> None:
    """Write a PNG with a line for each combination of settings other than the rank."""
    # Imported when needed: it is optional, and slow to import. A Figure of its own leaves the
    # user's pyplot alone.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lines = lines_of(points)
    named = len(lines) if 1 < len(lines) <= MOST_LINES_NAMED else 0
    figure = Figure(figsize=(6.4, 4.4 + 0.2 * named), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        x, y = [point.parameters for point in line], [point.score for point in line]
        # As much of the name as fits below the plot.
        shown = name if len(name) <= 90 else f"{name[:89]}…"
        axes.plot(x, y, marker="o", markersize=5, linewidth=1.4, label=shown)
    if any(RANK in point.settings for point in points):
        _write_ranks(axes, points, falling=score_name.endswith("loss"))
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("trained parameters (log scale)")
    axes.set_ylabel(f"{score_name}{_unit(score_name)}")
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(_ticks(points))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(float(value))))
    axes.minorticks_off()
    if named:
        figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(file)


def lines_of(points: Sequence[TrialPoint]) -> dict[str, list[TrialPoint]]:
    """The points of each line, by the line's name, from few parameters to many.

    A setting that the rank decides, such as an alpha of twice the rank, makes no lines of its own.
    """
    keys = [key for key in points[0].settings if key != RANK and not _follows_rank(points, key)]
    lines: dict[str, list[TrialPoint]] = {}
    for point in sorted(points, key=lambda point: point.parameters):
        name = label({key: point.settings[key] for key in keys})
        lines.setdefault(name, []).append(point)
    return lines


def _follows_rank(points: Sequence[TrialPoint], key: str) -> bool:
    """Whether all points of one rank have one value of a setting, and ranks differ."""
    values: dict[Any, set[str]] = {}
    for point in points:
        values.setdefault(point.settings.get(RANK), set()).add(repr(point.settings[key]))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


def _write_ranks(axes: Any, points: Sequence[TrialPoint], *, falling: bool) -> None:
    """Write each rank once per number of parameters, above the highest point there.

    A line that falls leaves room on the right of a point, one that rises on the left.
    """
    highest: dict[int, TrialPoint] = {}
    for point in points:
        if point.score >= highest.setdefault(point.parameters, point).score:
            highest[point.parameters] = point
    for point in highest.values():
        axes.annotate(
            f"r = {point.settings[RANK]}",
            (point.parameters, point.score),
            xytext=(4 if falling else -4, 5),
            textcoords="offset points",
            ha="left" if falling else "right",
            fontsize=8,
            color="0.3",
        )


def _ticks(points: Sequence[TrialPoint]) -> list[int]:
    """The numbers of parameters, without those too near to the one before to be legible."""
    counts = sorted({point.parameters for point in points})
    nearest = (counts[-1] / counts[0]) ** 0.12
    ticks = counts[:1]
    for count in counts[1:]:
        if count >= ticks[-1] * nearest:
            ticks.append(count)
    return ticks


def _unit(score_name: str) -> str:
    units = {"validation loss": " (nats per token)", "validation accuracy": " (share of rows)"}
    return units.get(score_name, "")


def _count(value: float) -> str:
    """A number of parameters in three figures: 1,234,567 as 1.23M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"

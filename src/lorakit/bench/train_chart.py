"""The chart of a benchmark of training: speed and memory as bars, and the losses beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.bench.result import OURS, check_writable
from lorakit.errors import MissingExtraError

COLOURS = {
    OURS: "#1d63c1",
    "compiled": "#8fb4e3",
    "peft": "#d9822b",
    "peft_by_length": "#b3541e",
    "peft_compiled": "#ecb77a",
    "full": "#7a828c",
}
"""The colour of each participant, in every panel."""
DASHES = {OURS: "-", "full": ":"}
"""The lines of losses; those of the others are dashed, so that of equal curves both are seen."""


def check_chart(file: Path | None) -> None:
    """Make sure that a chart can be drawn, if there is a file for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    if file is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("the chart (--plot)", "plots")
    check_writable(file)


def draw(
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[float]],
    file: Path,
    *,
    title: str,
) -> None:
    """Draw speed, memory and losses, and write them as PNG.

    Args:
        rows: the table of participants, as `measure_train` makes it.
        curves: the loss of each step, by participant.
        file: the PNG, which is replaced.
        title: what was trained.
    """
    # Imported when needed: it is optional, and slow to import. A Figure of its own leaves the
    # user's pyplot alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 1.9 + 0.4 * len(rows)), dpi=150, layout="constrained")
    speed, memory, losses = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    figure.suptitle(title, fontsize=10)
    _draw_speed(speed, rows)
    _draw_memory(memory, rows)
    _draw_losses(losses, curves)
    for axes in (speed, memory, losses):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_axisbelow(True)
    figure.savefig(file)


def _draw_speed(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    speeds = [row["useful tokens per second"] for row in rows]
    _bars(axes, rows, speeds)
    _write_beside(axes, speeds, [f"{speed:,.0f}" for speed in speeds])
    axes.set_title("useful tokens per second", fontsize=9)


def _draw_memory(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw two stacked bars: loaded memory in a pale tone, what training adds in a full one."""
    axes.set_title("memory, MB: loaded (pale) + training", fontsize=9)
    known = [row for row in rows if row["above that_bytes"] is not None]
    loaded = [row["loaded_bytes"] / 1e6 for row in known]
    above = [row["above that_bytes"] / 1e6 for row in known]
    _bars(axes, known, loaded, alpha=0.3)
    _bars(axes, known, above, left=loaded)
    ends = [sum(pair) for pair in zip(loaded, above, strict=True)]
    texts = [f"{a:,.0f} + {b:,.0f}" for a, b in zip(loaded, above, strict=True)]
    _write_beside(axes, ends, texts)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], widths: list[float], **how: Any) -> None:
    names = [_label(row["who"]) for row in rows]
    colours = [COLOURS[row["who"]] for row in rows]
    axes.barh(names, widths, color=colours, height=0.62, **how)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6)


def _write_beside(axes: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Write each bar's figure to the right of it."""
    for position, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(
            text,
            (end, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    # Room for the figures: the longest is beside the longest bar.
    axes.set_xlim(0, max(ends, default=1.0) * 1.4)


def _draw_losses(axes: Any, curves: Mapping[str, Sequence[float]]) -> None:
    for name, losses in curves.items():
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            color=COLOURS[name],
            linestyle=DASHES.get(name, "--"),
            linewidth=2.4 if name == OURS else 1.3,
            label=_label(name),
        )
    axes.set_title("training loss (nats per target token)", fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def _label(name: str) -> str:
    labels = {
        "compiled": "ours compiled",
        "peft": "PEFT",
        "peft_by_length": "PEFT by length",
        "peft_compiled": "PEFT compiled",
    }
    return labels.get(name, name)

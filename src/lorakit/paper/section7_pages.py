"""Section 7's figures and table as pages and pictures, ours beside what the paper reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.analysis.figures import HeatMap, check_plots, shown, write_panels
from lorakit.analysis.report_of_two import phi_map
from lorakit.paper.markdown import grid, heading
from lorakit.paper.section7 import STUDIES

POINTS = ((1, 1), (2, 2), (4, 4), (8, 8), (8, 64), (64, 64))
"""Numbers of directions (i, j) of which φ is listed."""
NUMBERS = {
    "in_delta": "in ΔW's directions",
    "in_weight": "in W's",
    "in_random": "in random ones",
    "weight_norm": "‖W‖",
    "delta_norm": "‖ΔW‖",
    "factor": "amplification",
}
"""The columns of Table 7."""
PAPERS = {
    "GPT-3, W_q of layer 48, r = 4": ("0.32", "21.67", "0.02", "61.95", "6.91", "21.5"),
    "GPT-3, W_q of layer 48, r = 64": ("1.90", "37.71", "0.33", "61.95", "3.57", "1.9"),
}
"""The paper's values; the last one of r = 64 is 3.57/1.90, which it does not print."""


def study_page(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """A figure or the table as Markdown, and what the paper reports."""
    study = STUDIES[name]
    runs = " and ".join(f"{label} (`{cell}`)" for label, (cell, _) in study.runs.items())
    if name.startswith("figure"):
        head = ["", *(f"φ({i}, {j})" for i, j in POINTS)]
        rows = [[title, *_at_points(phi)] for title, phi in _panels(found)]
        what = f"φ of A (Eq. 4) between {runs}."
    else:
        head = ["", *NUMBERS.values()]
        rows = [*_amplified(found), *([title, *values] for title, values in PAPERS.items())]
        what = f"‖UᵀWV‖ in the directions of ΔW, of W and of random matrices, of {runs}."
    return (
        f"# {heading(name)}: {study.title}\n\n{what}\n\n{grid(head, rows)}\n\n"
        f"The paper, of GPT-3: {study.paper}.\n"
    )


def _amplified(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for entry in found:
        for module, runs in entry["modules"].items():
            for label, values in runs.items():
                where = f"{_where(entry)}, {module} of layer {entry['middle']}, {label}"
                yield [where, *(shown(values[name]) for name in NUMBERS)]


def _where(entry: Mapping[str, Any]) -> str:
    model = next(iter(entry["runs"].values()))["model"]
    return f"{model}, {entry['task']}"


def _at_points(phi: Sequence[Sequence[float]]) -> list[str]:
    return [
        f"{phi[i - 1][j - 1]:.2f}" if i <= len(phi) and j <= len(phi[0]) else "–" for i, j in POINTS
    ]


def _panels(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[list[float]]]]:
    """The title and φ of each panel."""
    for entry in found:
        where = {"middle": f"layer {entry['middle']}", "random": "random"}
        where["mean"] = f"mean of {entry['layers']} layers"
        for module, phis in entry["modules"].items():
            for kind, phi in phis.items():
                yield f"{_where(entry)}, {module}, {where[kind]}", phi


def draw_similarity(name: str, found: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the heat maps of φ as one picture: a row for each module of a model.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the files cannot be written.
    """
    check_plots()
    first, second = STUDIES[name].runs
    maps: list[HeatMap] = [
        phi_map(f"panel-{number}", title, "", torch.tensor(phi), names=(first, second))
        for number, (title, phi) in enumerate(_panels(found))
    ]
    rows = [maps[at : at + 3] for at in range(0, len(maps), 3)]
    return write_panels(rows, f"{name}.small", folder)

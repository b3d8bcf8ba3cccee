"""Section 7's figures and table as pages and pictures, ours beside what the paper reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.analysis.figures import HeatMap, check_plots, shown, write_panels
from lorakit.analysis.report_of_two import phi_map
from lorakit.paper.markdown import grid, heading
from lorakit.paper.study import studies

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


def study_page(name: str, found: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """A figure or the table as Markdown, and what the paper reports.

    Args:
        name: of the figure or table.
        found: what was found, of each task.
        notes: what a reader must know of it.
    """
    study = studies()[name]
    if study.look == "similarity":
        head = ["", *(f"φ({i}, {j})" for i, j in POINTS)]
        rows = [[title, *_at_points(phi)] for title, phi in _panels(found)]
        what = f"φ of A (Eq. 4) between {' and '.join(study.runs)}."
    else:
        head = ["", *NUMBERS.values()]
        papers = [[title, *values] for title, values in study.published.items()]
        rows = [*_amplified(found), *papers]
        what = "‖UᵀWV‖ in the directions of ΔW, of W and of random matrices."
    parts = [
        f"# {heading(name)}: {study.title}",
        f"{what} {study.note}",
        *notes,
        *map(_made_with, found),
    ]
    if rows:
        parts.append(grid(head, rows))
    parts.append(f"The paper, of GPT-3: {study.paper}. Rebuilt by `lorakit paper run {name}`.")
    return "\n\n".join(parts) + "\n"


def _made_with(entry: Mapping[str, Any]) -> str:
    """The runs of a task, their scores, and what computed them."""
    runs = "; ".join(
        f"{label}: `{run['cell']}`, seed {run['seed']}, {run['steps']} steps, "
        + ", ".join(f"{score} {value:.4g}" for score, value in run["scores"].items())
        for label, run in entry["runs"].items()
    )
    return f"{_where(entry)}. {runs}. Commit {entry['commit']}; {entry['hardware']['processor']}."


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
    first, second = studies()[name].runs
    maps: list[HeatMap] = [
        phi_map(f"panel-{number}", title, "", torch.tensor(phi), names=(first, second))
        for number, (title, phi) in enumerate(_panels(found))
    ]
    rows = [maps[at : at + 3] for at in range(0, len(maps), 3)]
    return write_panels(rows, f"{name}.small", folder)

"""Section 7 of the paper: Figures 3 and 4 and Table 7, which look into adapters of Table 6.

The runs are Table 6's jobs. Their adapters are kept in the folder of work, so that each is trained
once for all three; of what is found in them there is one file for each task:

    paper/results/figure3.small/mnli.json
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.atomic_write import read_file, write_files
from lorakit.analysis.amplifying import amplification
from lorakit.analysis.by_layer import ByLayer
from lorakit.analysis.report_of_two import mean_phi
from lorakit.analysis.subspaces import random_control, subspace_similarity
from lorakit.bench.environment import environment
from lorakit.bench.result import threads
from lorakit.config.paper import Chosen, PaperRunConfig
from lorakit.errors import ConfigError, DataError
from lorakit.paper.check import check
from lorakit.paper.job import Job, jobs_of
from lorakit.training.run import train

FORMAT = 1
"""Of the file: a number that a change of its meaning raises."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A figure or table of section 7."""

    title: str
    runs: Mapping[str, tuple[str, int]]
    """What is looked into: the cell and the seed of a run, by the name that it has there."""
    paper: str
    """What the paper reports of GPT-3."""
    look: Callable[[Mapping[str, Adapter]], dict[str, Any]]
    """What is found in the adapters, as JSON values."""


def _similarity(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """φ of two adapters: of each module in the middle layer and on average, and of chance."""
    first, second = adapters.values()
    phi = subspace_similarity(first, second)
    by_layer = ByLayer.of(phi)
    modules = {}
    for module in by_layer.modules:
        sites = by_layer.sites_of(module)
        width = first.tensors[f"{sites[by_layer.middle]}.lora_a"].shape[1]
        middle = phi[sites[by_layer.middle]]
        modules[module] = {
            "middle": _rounded(middle),
            "mean": _rounded(mean_phi([phi[site] for site in sites.values()])),
            "random": _rounded(random_control(*((rank, width) for rank in middle.shape))),
        }
    return {"layers": len(by_layer.layers), "middle": by_layer.middle, "modules": modules}


def _amplification(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """How much of W lies in the directions of ΔW: of each module in the middle layer."""
    model, _ = next(iter(adapters.values())).load_base()
    modules: dict[str, dict[str, Any]] = {}
    for label, adapter in adapters.items():
        found = amplification(adapter, model)
        by_layer = ByLayer.of(found)
        for module in by_layer.modules:
            site = by_layer.sites_of(module)[by_layer.middle]
            modules.setdefault(module, {})[label] = found[site].to_json()
    return {"layers": len(by_layer.layers), "middle": by_layer.middle, "modules": modules}


def _rounded(phi: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in phi.tolist()]


STUDIES: Mapping[str, Study] = {
    "figure3": Study(
        title="Directions that ranks 8 and 64 share",
        runs={"r = 8": ("table6.qv-8", 0), "r = 64": ("table6.qv-64", 0)},
        paper="φ is above 0.5 for the first direction of both ΔW_q and ΔW_v, and small for others",
        look=_similarity,
    ),
    "figure4": Study(
        title="Directions that two seeds share",
        runs={"seed 0": ("table6.qv-64", 0), "seed 1": ("table6.qv-64", 1)},
        paper="ΔW_q shares more directions between seeds than ΔW_v; random matrices share none",
        look=_similarity,
    ),
    "table7": Study(
        title="How much of W lies in the directions of ΔW",
        runs={"r = 4": ("table6.qv-4", 0), "r = 64": ("table6.qv-64", 0)},
        paper="ΔW amplifies directions that W has but does not stress, by 21.5 at r = 4",
        look=_amplification,
    ),
}


def studies_in(words: Sequence[str]) -> list[str]:
    """The names of section 7 among the names of cells."""
    return [word for word in words if word in STUDIES]


def run_studies(settings: PaperRunConfig, *, progress: bool) -> list[Path]:
    """Train what is missing, look into it, and write what was found; the files.

    Raises:
        ConfigError: something is missing or wrong; nothing was run.
        TrainingError: a run was stopped by a guardrail.
    """
    planned = {name: _planned(STUDIES[name], settings) for name in studies_in(settings.cells)}
    jobs = [job for each in planned.values() for runs in each.values() for job in runs.values()]
    data = check(settings, jobs)
    if settings.dry_run:
        return []
    made = environment()
    written = []
    with threads(settings.threads):
        for name, tasks in planned.items():
            for task, runs in tasks.items():
                adapters = {
                    label: _adapter(job, settings, progress=progress) for label, job in runs.items()
                }
                entry = {
                    "format": FORMAT,
                    "study": name,
                    "task": task,
                    "runs": {label: _entry(job, adapters[label]) for label, job in runs.items()},
                    "data": data.hashes(next(iter(runs.values())))["train"],
                    **STUDIES[name].look(adapters),
                    **made,
                }
                written.append(_write(entry, settings.results))
    return written


def _planned(study: Study, settings: Chosen) -> dict[str, dict[str, Job]]:
    """The jobs of a study by task and by their names there."""
    if settings.scale != "small":
        raise ConfigError("section 7 has small twins alone: the paper's adapters are of GPT-3")
    found: dict[str, dict[str, Job]] = {}
    for label, (cell, seed) in study.runs.items():
        for job in jobs_of(settings.model_copy(update={"cells": (cell,), "seeds": (seed,)})):
            found.setdefault(job.task, {})[label] = job
    return found


def _adapter(job: Job, settings: PaperRunConfig, *, progress: bool) -> Adapter:
    """The adapter of a job, trained unless it is kept from before."""
    name = f"{job.cell.id}-{job.task}-{job.hash}-seed-{job.seed}"
    kept = settings.work / "section7" / name
    if not kept.is_dir() or settings.redo:
        print(job.name, file=sys.stderr, flush=True)
        out = settings.work / "section7-training" / name
        config = job.config(data=settings.data, out=out).model_copy(update={"overwrite": True})
        train(config, progress=progress).adapter.save(kept, overwrite=True)
        shutil.rmtree(out)
    return Adapter.load(kept)


def _entry(job: Job, adapter: Adapter) -> dict[str, Any]:
    return {
        "cell": job.cell.id,
        "model": job.model,
        "seed": job.seed,
        "hash": job.hash,
        "steps": adapter.card["step"],
        "scores": adapter.card["scores"],
        "content_hash": adapter.content_hash(),
    }


def _write(entry: Mapping[str, Any], results: Path) -> Path:
    folder, name = results / f"{entry['study']}.small", f"{entry['task']}.json"
    write_files(folder, {name: f"{json.dumps(entry)}\n".encode()}, overwrite=True)
    return folder / name


def found_of(name: str, results: Path) -> list[dict[str, Any]]:
    """What was found for a figure or table, of each task.

    Raises:
        DataError: there is nothing yet, or a file is something else.
    """
    folder = results / f"{name}.small"
    found = []
    for file in sorted(folder.glob("*.json")):
        text = read_file(folder, file.name)
        entry = json.loads(text or "{}")
        if entry.get("format") != FORMAT:
            raise DataError(f"{file} is no result of `lorakit paper run {name}`")
        found.append(entry)
    if not found:
        raise DataError(f"there is no result in {folder}: `lorakit paper run {name}` makes it")
    return found

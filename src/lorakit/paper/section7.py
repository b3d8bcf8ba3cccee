"""Section 7 of the paper: Figures 3 and 4 and Table 7, which look into adapters of Table 6.

The runs are jobs of Tables 3 and 6. Their folders are kept in the folder of work, so that each is
trained once for all three, goes on where it was interrupted, and can be looked into by `lorakit
inspect`; of what is found in the adapters there is one file for each task:

    paper/results/figure3.small/sst2.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.atomic_write import write_files
from lorakit.analysis.amplifying import amplification
from lorakit.analysis.by_layer import ByLayer
from lorakit.analysis.report_of_two import mean_phi
from lorakit.analysis.subspaces import random_control, subspace_similarity
from lorakit.bench.environment import environment
from lorakit.bench.result import threads
from lorakit.errors import DataError
from lorakit.paper.check import check
from lorakit.paper.job import Job
from lorakit.paper.results import FORMAT, State, read_result
from lorakit.paper.run import stopped
from lorakit.paper.settings import CellChoice, PaperRunConfig
from lorakit.paper.study import studies, studies_in
from lorakit.training.checkpoints import list_checkpoints
from lorakit.training.run import train


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


LOOKS: Mapping[str, Callable[[Mapping[str, Adapter]], dict[str, Any]]] = {
    "similarity": _similarity,
    "amplification": _amplification,
}
"""What is found in adapters, as JSON values."""


def run_studies(settings: PaperRunConfig, *, progress: bool) -> list[Path]:
    """Look into what has no current result, training what is missing, and write it; the files.

    Raises:
        ConfigError: something is missing or wrong; nothing was run.
        TrainingError: a run was stopped by a guardrail.
    """
    planned = {name: studies()[name].jobs(settings) for name in studies_in(settings.cells)}
    jobs = [job for each in planned.values() for runs in each.values() for job in runs.values()]
    data = check(settings, jobs)
    if settings.dry_run:
        return []
    made = environment()
    written = []
    with threads(settings.threads):
        for name, tasks in planned.items():
            for task, runs in tasks.items():
                rows = data.hashes(next(iter(runs.values())))["train"]
                known = state_of_study(name, task, runs, settings.results, rows=rows)
                if known.kind == "done" and not settings.redo:
                    continue
                adapters = {
                    label: _adapter(job, settings, progress=progress) for label, job in runs.items()
                }
                about = {"format": FORMAT, "study": name, "task": task, "data": rows}
                entries = {label: _entry(job, adapters[label]) for label, job in runs.items()}
                looked = LOOKS[studies()[name].look](adapters)
                entry = {**about, "runs": entries, **looked, **made}
                written.append(_write(entry, settings.results))
    return written


def states_of_studies(names: Sequence[str], settings: CellChoice) -> dict[tuple[str, str], State]:
    """What there is of figures and tables of section 7, by name and task; {} at full scale.

    Raises:
        DataError: a file is something else.
    """
    if settings.scale != "small":
        return {}
    return {
        (name, task): state_of_study(name, task, runs, settings.results)
        for name in names
        for task, runs in studies()[name].jobs(settings, skip=True).items()
    }


def state_of_study(
    name: str, task: str, runs: Mapping[str, Job], results: Path, *, rows: str | None = None
) -> State:
    """What there is of a task's file, and whether its adapters are of the present settings.

    Args:
        name: of the figure or table.
        task: of the runs.
        runs: the present ones, by their names there.
        results: the folder of results.
        rows: the hash of the rows that they train on, where the data is at hand.

    Raises:
        DataError: the file is something else.
    """
    found = _read(name, results / f"{name}.small" / f"{task}.json")
    if found is None:
        return State(kind="not run")
    then = {label: run["hash"] for label, run in found["runs"].items()}
    changed = [label for label, job in runs.items() if then.get(label) != job.hash]
    why = [f"settings of {label}" for label in changed]
    if rows not in (None, found["data"]):
        why.append("rows of train")
    return State(kind="stale" if why else "done", why=", ".join(why), result=found)


def _adapter(job: Job, settings: PaperRunConfig, *, progress: bool) -> Adapter:
    """The adapter of a job, trained unless its run is kept from before and came to its end."""
    name = f"{job.cell.id}-{job.task}-{job.hash}-seed-{job.seed}"
    out = settings.work / "section7" / name
    if settings.redo or not (out / "last").is_dir():
        print(job.name, file=sys.stderr, flush=True)
        resumes = not settings.redo and bool(list_checkpoints(out / "checkpoints"))
        config = job.config(data=settings.data, out=out)
        how = {"resume": resumes, "overwrite": not resumes}
        try:
            train(config.model_copy(update=how), progress=progress)
        except KeyboardInterrupt as stop:
            raise stopped(job.name, stop) from None
    return Adapter.load(out)


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
    """What was found for a figure or table, of each task; [] before the first run.

    Raises:
        DataError: a file is something else.
    """
    files = sorted((results / f"{name}.small").glob("*.json"))
    return [entry for file in files if (entry := _read(name, file))]


def _read(name: str, file: Path) -> dict[str, Any] | None:
    """The content of a file; None: there is none.

    Raises:
        DataError: it is something else.
    """
    found = read_result(file)
    if found is not None and found.get("study") != name:
        raise DataError(f"{file} is no result of `lorakit paper run {name}`")
    return found

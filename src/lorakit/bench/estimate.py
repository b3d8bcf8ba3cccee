"""Estimates of memory beside what runs of `lorakit train` and servers take, in fresh processes.

A process has imported everything and trained a tiny model first, so that what it takes more from
then on is the run: its base, and the peak while it trains. A run is measured with each larger
piece of memory mapped by itself; and as it is, with the holes of glibc's heap, if that is asked
for. Of processes that train together, the one that takes most counts.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.bench.estimate_runs import (
    OTHERS,
    RANDOM,
    RUNS,
    SERVERS,
    TOGETHER,
    MeasuredRun,
    ServedRun,
    loaded_base,
    random_config,
)
from lorakit.bench.estimate_served import estimated_server, server_bytes, tiny_base
from lorakit.bench.fresh_process import MAPPED, in_fresh_processes, settled_bytes
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.bench.result import Findings, Goal, threads
from lorakit.bench.serving.process import free_port
from lorakit.config.bench import EstimateBenchConfig
from lorakit.config.estimate import EstimateConfig
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError
from lorakit.estimating.estimate import Estimate, estimate
from lorakit.models.without_weights import build_without_weights
from lorakit.training.loaded_base import LoadedBase, settled
from lorakit.training.prepare import prepare
from lorakit.training.processes import together
from lorakit.training.run import Run, execute, while_training

WITHIN_PERCENT = 10.0
"""How far an estimate of memory may be from what is measured."""
LONG = "the quick brown fox jumps over the lazy dog and runs away "
"""Repeated, it is longer than any row."""


GROUPS: Mapping[str, tuple[MeasuredRun, ...] | tuple[ServedRun, ...]] = {
    "runs of these models": RUNS,
    "runs of others": OTHERS,
    "runs of two processes": TOGETHER,
    "servers": SERVERS,
}
"""What is measured, each group in a table of its own."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a process took for a run."""

    peak_bytes: int
    """The peak of training above what the process had before the base was loaded."""
    saved_bytes: int
    """The peak until the end, when the adapter was written too."""
    step_s: float
    """Of the last step."""


def measure_estimates(settings: EstimateBenchConfig) -> Findings:
    """Train each run for a few steps, fill each server, and compare its peak with its estimate.

    Raises:
        ConfigError: nothing has a name like those that were asked for.
        TrainingError: the system does not tell how much memory a process has.
    """
    tables = {
        group: [_row(run, settings) for run in runs if _is_asked(run, settings)]
        for group, runs in GROUPS.items()
    }
    tables = {group: rows for group, rows in tables.items() if rows}
    if not tables:
        known = [run.name for runs in GROUPS.values() for run in runs]
        raise ConfigError("only: no run is called like that; they are " + "; ".join(known))
    goals = tuple(
        Goal(
            what=f"largest error of memory, {len(rows)} {group}",
            got=max(abs(row["error_percent"]) for row in rows),
            limit=WITHIN_PERCENT,
            unit="%",
        )
        for group, rows in tables.items()
    )
    return Findings(timings={}, goals=goals, tables=tables, checks={"steps": settings.steps})


def _is_asked(run: MeasuredRun | ServedRun, settings: EstimateBenchConfig) -> bool:
    return not settings.only or any(word in run.name for word in settings.only)


def _row(run: MeasuredRun | ServedRun, settings: EstimateBenchConfig) -> dict[str, Any]:
    return _served(run, settings) if isinstance(run, ServedRun) else _trained(run, settings)


def _served(run: ServedRun, settings: EstimateBenchConfig) -> dict[str, Any]:
    row = _compared(
        "server", run.name, estimated_server(run), server_bytes(run, settings.threads, MAPPED)
    )
    if settings.holes:
        row["with holes_bytes"] = server_bytes(run, settings.threads, {})
    return row


def _trained(run: MeasuredRun, settings: EstimateBenchConfig) -> dict[str, Any]:
    found, taken = estimated(run), _measured(run, settings, MAPPED)
    row = {
        **_compared("run", run.name, found.training_bytes, taken.peak_bytes),
        "until written_bytes": taken.saved_bytes,
        "estimated step_s": found.seconds,
        "measured step_s": taken.step_s,
    }
    if settings.holes:
        as_it_is = _measured(run, settings, {})
        row |= {"with holes_bytes": as_it_is.peak_bytes, "with holes step_s": as_it_is.step_s}
    return row


def _compared(what: str, name: str, said: int, took: int) -> dict[str, Any]:
    error = 100 * (said / took - 1)
    return {what: name, "estimated_bytes": said, "measured_bytes": took, "error_percent": error}


def _measured(
    run: MeasuredRun, settings: EstimateBenchConfig, variables: Mapping[str, str]
) -> Taken:
    """What a run takes in processes that begin with these environment variables."""
    steps, count = run.steps or settings.steps, settings.threads
    if run.processes == 1:
        return in_fresh_processes(taken_by, [(run, steps, count)], variables)[0]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched["WORLD_SIZE"] = str(run.processes)
    each = [(run, steps, count, number) for number in range(run.processes)]
    found = in_fresh_processes(taken_by, each, {**variables, **launched})
    return max(found, key=lambda taken: taken.peak_bytes)


def estimated(run: MeasuredRun) -> Estimate:
    """The estimate of a run."""
    settings: dict[str, Any] = {"dtype": run.dtype, "task": run.task, **run.settings}
    config = EstimateConfig(
        model=run.base,
        row_tokens=run.tokens,
        batch_size=run.rows,
        processes=run.processes,
        **settings,
    )
    if run.base not in RANDOM:
        return estimate(config)
    shape = build_without_weights(random_config(run.base), dtype=run.dtype)
    return estimate(config, model=shape)


def taken_by(run: MeasuredRun, steps: int, count: int | None, number: int = 0) -> Taken:
    """Train a run in this process, which should be a fresh one, and measure what it takes.

    Args:
        run: what is trained.
        steps: optimizer steps.
        count: threads of torch.
        number: of this process among those that train together.

    Raises:
        TrainingError: the system does not tell how much memory a process has.
    """
    if run.processes > 1:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
        # A second's worth of code, which is none of the run's memory.
        importlib.import_module("torch.distributed.fsdp")
    with threads(count), tempfile.TemporaryDirectory() as folder, together():
        tiny = MeasuredRun(base="tiny", rows=run.processes, tokens=16)
        _train(tiny, _loaded(*tiny_base()), 1, Path(folder, "first"))
        before = settled_bytes()
        # A base that is divided has to be loaded by the run itself.
        base = None if run.processes > 1 else _loaded(*loaded_base(run))
        watch = _train(run, base, steps, Path(folder, "run"))
        last = most_bytes()
        assert last is not None
        return Taken(
            peak_bytes=watch.peak_bytes - before,
            saved_bytes=last - before,
            step_s=watch.seconds[-1],
        )


def _loaded(model: Any, tokenizer: Any) -> LoadedBase:
    return LoadedBase(model=model, tokenizer=tokenizer)


@dataclass
class Watch(TrainerCallback):
    """Notes the peak of memory and the time of each step."""

    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    _begun: float = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the peak of loading, where a base that is divided was whole."""
        settled_bytes()
        forget_peak()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        self._begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the peak so far."""
        self.seconds.append(time.perf_counter() - self._begun)
        self.peak_bytes = most_bytes() or 0


def _train(run: MeasuredRun, base: LoadedBase | None, steps: int, folder: Path) -> Watch:
    """Train as `lorakit train` does, on rows that are all as long as they may be."""
    data = _rows(run, run.rows * steps, folder.with_suffix(".jsonl"))
    settings: dict[str, Any] = {
        "data": {"train": str(data), "max_length": run.tokens},
        "allow_untrained": True,
        **run.settings,
    }
    config = TrainConfig(
        model=run.base, out=folder, batch_size=run.rows, steps=steps, dtype=run.dtype, **settings
    )
    config, watch = settled(config, base), Watch()
    prepared = prepare(config, base)
    with while_training(prepared.model, config) as interruption:
        execute(Run.of(config, prepared, None), interruption, bar=watch)
    return watch


def _rows(run: MeasuredRun, count: int, file: Path) -> Path:
    text = LONG * (run.tokens // 8 + 1)
    row: Mapping[str, Any] = {"text": text}
    rows = [row] * count
    if run.task == "classification":
        rows = [{**row, "label": ("no", "yes")[number % 2]} for number in range(count)]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")
    return file

"""Estimates of memory beside what runs of `lorakit train` take, each in a process of its own.

A process has imported everything and trains a tiny model first, so that what it takes more from
then on is the run: its base, and the peak while it trains. glibc keeps what was freed in holes
between what is not, so a run is measured with each larger piece of memory mapped by itself, which
goes back to the system at once; and as it is, if that is asked for.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lorakit.bench.estimate_runs import (
    OTHERS,
    RANDOM,
    RUNS,
    MeasuredRun,
    loaded_base,
    random_config,
)
from lorakit.bench.memory import forget_peak, most_bytes, used_bytes
from lorakit.bench.result import Findings, Goal, threads
from lorakit.config.bench import EstimateBenchConfig
from lorakit.config.estimate import EstimateConfig
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError, TrainingError
from lorakit.estimating.estimate import Estimate, estimate
from lorakit.models.without_weights import build_without_weights, load_tokenizer
from lorakit.training.loaded_base import LoadedBase, settled
from lorakit.training.prepare import prepare
from lorakit.training.run import Run, execute, while_training

WITHIN_PERCENT = 10.0
"""How far an estimate of memory may be from what is measured."""
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""The environment in which glibc maps pieces of so many bytes by themselves."""
LONG = "the quick brown fox jumps over the lazy dog and runs away "
"""Repeated, it is longer than any row."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a run took."""

    peak_bytes: int
    """The peak of training above what the process had before the base was loaded."""
    base_bytes: int
    """What it had more once the base was loaded."""
    saved_bytes: int
    """The peak until the end, when the adapter was written too."""
    step_s: float
    """Of the last step."""


def measure_estimates(settings: EstimateBenchConfig) -> Findings:
    """Train each run for a few steps, and compare its peak with its estimate.

    Raises:
        ConfigError: no run has a name like those that were asked for.
        TrainingError: the system does not tell how much memory a process has.
    """
    groups = {"of these models": RUNS, "of others": OTHERS}
    tables = {
        group: [_row(run, settings) for run in runs if _is_asked(run, settings)]
        for group, runs in groups.items()
    }
    tables = {group: rows for group, rows in tables.items() if rows}
    if not tables:
        raise ConfigError(
            "only: no run is called like that; they are "
            + "; ".join(run.name for run in (*RUNS, *OTHERS))
        )
    goals = tuple(
        Goal(
            what=f"largest error of memory, {len(rows)} runs {group}",
            got=max(abs(row["error_percent"]) for row in rows),
            limit=WITHIN_PERCENT,
            unit="%",
        )
        for group, rows in tables.items()
    )
    return Findings(timings={}, goals=goals, tables=tables, checks={"steps": settings.steps})


def _is_asked(run: MeasuredRun, settings: EstimateBenchConfig) -> bool:
    return not settings.only or any(word in run.name for word in settings.only)


def _row(run: MeasuredRun, settings: EstimateBenchConfig) -> dict[str, Any]:
    found = estimated(run)
    taken = _measured(run, settings, MAPPED)
    row = {
        "run": run.name,
        "estimated_bytes": found.training_bytes,
        "measured_bytes": taken.peak_bytes,
        "error_percent": 100 * (found.training_bytes / taken.peak_bytes - 1),
        "until written_bytes": taken.saved_bytes,
        "estimated step_s": found.seconds,
        "measured step_s": taken.step_s,
    }
    if settings.holes:
        as_it_is = _measured(run, settings, {})
        row |= {"with holes_bytes": as_it_is.peak_bytes, "with holes step_s": as_it_is.step_s}
    return row


def _measured(
    run: MeasuredRun, settings: EstimateBenchConfig, variables: Mapping[str, str]
) -> Taken:
    """What a run takes in a process that begins with these environment variables."""
    with environment(variables):
        started = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=started) as process:
            return process.submit(taken_by, run, settings.steps, settings.threads).result()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give processes that begin inside a block more environment variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def estimated(run: MeasuredRun) -> Estimate:
    """The estimate of a run."""
    settings: dict[str, Any] = {"dtype": run.dtype, "task": run.task, **run.settings}
    config = EstimateConfig(model=run.base, row_tokens=run.tokens, batch_size=run.rows, **settings)
    if run.base not in RANDOM:
        return estimate(config)
    shape = build_without_weights(random_config(run.base), dtype=run.dtype)
    return estimate(config, model=shape)


def taken_by(run: MeasuredRun, steps: int, count: int | None) -> Taken:
    """Train a run in this process, which should be a fresh one, and measure what it takes.

    Raises:
        TrainingError: the system does not tell how much memory a process has.
    """
    with threads(count), tempfile.TemporaryDirectory() as folder:
        _train(_tiny(), *_tiny_base(), 1, Path(folder, "first"))
        before = _settled_bytes()
        base = loaded_base(run)
        loaded = _settled_bytes() - before
        forget_peak()
        watch = _train(run, *base, steps, Path(folder, "run"))
        last = most_bytes()
        assert last is not None
        return Taken(
            peak_bytes=watch.peak_bytes - before,
            base_bytes=loaded,
            saved_bytes=last - before,
            step_s=watch.seconds[-1],
        )


def _settled_bytes() -> int:
    """The memory of this process, after what is free was given back to the system.

    Raises:
        TrainingError: the system does not tell.
    """
    gc.collect()
    # Else what importing has freed would be used again, and not be seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    found = used_bytes()
    if found is None:
        raise TrainingError("this system does not tell how much memory a process has (Linux does)")
    return found


@dataclass
class Watch(TrainerCallback):
    """Notes the peak of memory and the time of each step."""

    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    _begun: float = 0.0

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


def _train(
    run: MeasuredRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    folder: Path,
) -> Watch:
    """Train as `lorakit train` does, on rows that are all as long as they may be."""
    data = _rows(run, run.rows * steps, folder.with_suffix(".jsonl"))
    settings: dict[str, Any] = {
        "data": {"train": str(data), "max_length": run.tokens},
        "allow_untrained": True,
        **run.settings,
    }
    config = TrainConfig(model=run.base, out=folder, batch_size=run.rows, steps=steps, **settings)
    base = LoadedBase(model=model, tokenizer=tokenizer)
    config_of_base = settled(config, base)
    watch = Watch()
    prepared = prepare(config_of_base, base)
    with while_training(model, config_of_base) as interruption:
        execute(Run.of(config_of_base, prepared, None), interruption, bar=watch)
    return watch


def _rows(run: MeasuredRun, count: int, file: Path) -> Path:
    text = LONG * (run.tokens // 8 + 1)
    row: Mapping[str, Any] = {"text": text}
    rows = [row] * count
    if run.task == "classification":
        rows = [{**row, "label": ("no", "yes")[number % 2]} for number in range(count)]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")
    return file


def _tiny() -> MeasuredRun:
    return MeasuredRun(base="tiny", rows=1, tokens=16)


def _tiny_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=49_152, num_hidden_layers=1, **sizes)
    tokenizer = load_tokenizer("smollm2")
    return transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer

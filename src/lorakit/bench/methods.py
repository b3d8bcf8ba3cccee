"""The methods of the paper beside each other, trained and scored on the same rows."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from lorakit.answering.answer import answer
from lorakit.attachment.state import active_name
from lorakit.bench.memory import forget_peak, most_bytes, used_bytes
from lorakit.bench.result import Findings
from lorakit.config.bench import MethodsConfig
from lorakit.config.methods import METHODS
from lorakit.config.train import TrainConfig
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_prompt
from lorakit.data.metrics.basic import bleu
from lorakit.data.row_types import Rows, references_of
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, DataError, LorakitError
from lorakit.models.load import load_model
from lorakit.routing.route import route
from lorakit.training.evaluation import scored
from lorakit.training.loss import Loss
from lorakit.training.prepare import prepare
from lorakit.training.run import Run, execute, while_training
from lorakit.training.virtual_tokens import encode_for
from lorakit.upstream.quiet_library import quiet_library

_Row = dict[str, Any]

EVERYWHERE = {"bitfit": {"bitfit": {"add_missing": True}}}
"""The settings with which a method can train every model, by its name."""

BASE = "base"
"""The name in the table of the model without any training."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One run."""

    name: str
    config: TrainConfig | None
    """None: the base is scored as it is."""

    @property
    def title(self) -> str:
        """Its name, and its rate if one is set."""
        rate = self.config and self.config.learning_rate
        return f"{self.name} at {rate:g}" if rate else self.name


def measure_methods(settings: MethodsConfig) -> Findings:
    """Train every method, and score each on the held-out rows.

    Raises:
        ConfigError: a method's settings cannot be used; every problem is listed.
        DataError: no rows to train on or to score are named.
        TrainingError: every run was stopped.
    """
    if settings.data.train is None or settings.data.validation is None:
        raise DataError("data.train and data.validation must name rows to train on and to score")
    with tempfile.TemporaryDirectory() as folder:
        entries = [_Entry(name=BASE, config=None), *_entries(settings, Path(folder))]
        with _workers(settings.parallel) as pool:
            running = {pool.submit(_measured, settings, each): each for each in entries}
            try:
                for run in as_completed(running):
                    _report(running[run], run)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    rows = [run.result() for run in running if run.exception() is None]
    stopped = {each.title: run.exception() for run, each in running.items() if run.exception()}
    trained = [row for row in rows if row["method"] != BASE]
    if not trained:
        raise next(error for error in stopped.values() if error is not None)
    tables = {"methods": rows}
    if any(len(rates) > 1 for rates in settings.rates.values()):
        tables["best"] = _best(trained)
    checks = {f"stopped, {title}": str(error) for title, error in stopped.items()}
    return Findings(timings={}, tables=tables, checks=checks)


def _report(entry: _Entry, run: Future[_Row]) -> None:
    """Print on stderr how a run ended; errors of the program end the whole comparison.

    A comparison takes long, and no method's result depends on the others: so each result is printed
    at once, and a run that was stopped ends alone.
    """
    error = run.exception()
    if error is not None and not isinstance(error, LorakitError):
        raise error
    print(f"{entry.title}: {error or json.dumps(run.result())}", file=sys.stderr, flush=True)


def _workers(count: int) -> Executor:
    """A pool that runs so many at a time, each in a fresh process, whose memory is its own."""
    afresh = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=afresh, max_tasks_per_child=1)


def _entries(settings: MethodsConfig, folder: Path) -> list[_Entry]:
    """A run for each method and learning rate; every wrong setting is in one error."""
    methods = settings.methods or {name: EVERYWHERE.get(name, {}) for name in METHODS}
    unknown = [name for name in settings.rates if name not in methods]
    problems = [f"rates: {name} is not among the methods" for name in unknown]
    entries: list[_Entry] = []
    for name, own in methods.items():
        for rate in settings.rates.get(name) or (None,):
            out = folder / f"{len(entries)}"
            try:
                entries.append(_Entry(name=name, config=_config(settings, name, own, rate, out)))
            except LorakitError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise ConfigError.listing("some methods cannot be compared", problems)
    return entries


def _config(
    settings: MethodsConfig, name: str, own: Mapping[str, Any], rate: float | None, out: Path
) -> TrainConfig:
    shared: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "out": out,
        "data": settings.data.model_copy(
            update={"validation": None, "validation_rows": None, "validation_every": None}
        ),
        "task": settings.task,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "save_every": settings.steps,
    }
    tried = {} if rate is None else {"learning_rate": rate}
    return TrainConfig(**{"method": name, **own, **tried, **shared})


class PeakMemory(TrainerCallback):
    """A callback that notes the memory before the first step, and its peak until the last."""

    def __init__(self) -> None:
        self.before_bytes: int | None = None
        self.most_bytes: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the peak of loading."""
        forget_peak()
        self.before_bytes = used_bytes()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the peak, before the scores are computed."""
        self.most_bytes = most_bytes()


def _measured(settings: MethodsConfig, entry: _Entry) -> _Row:
    """The row of one run in the table, which this process trains and scores."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with quiet_library():
        if entry.config is None:
            return _row_of_base(settings)
        return _row(settings, entry.name, entry.config)


def _row(settings: MethodsConfig, name: str, config: TrainConfig) -> _Row:
    prepared = prepare(config)
    peak = PeakMemory()
    run = Run(config=config, prepared=prepared, checkpoint=None)
    with while_training(prepared.model, config) as interruption:
        result = execute(run, interruption, bar=peak)
    with route(prepared.model, prepared.name):
        scores = _scores(settings, prepared.model, prepared.tokenizer, prepared.labels)
    rate = max(rate.value for rate in prepared.rates.values())
    return {
        "method": name,
        "learning rate": rate,
        "trained": prepared.plan.parameters,
        "loss in training": result.last_loss,
        **scores,
        "time_s": result.seconds,
        "memory_bytes": peak.most_bytes,
    }


def _row_of_base(settings: MethodsConfig) -> _Row:
    """The scores of the model without any training."""
    data, limit = settings.data, settings.data.train_rows
    asked = None if settings.task == "auto" else settings.task
    rows = read_rows(str(data.train), data, limit=limit, task=asked)
    task = asked or rows.task
    model, tokenizer = load_model(
        settings.model, dtype=settings.dtype, task=task, labels=rows.labels
    )
    scores = _scores(settings, model, tokenizer, rows.labels)
    nothing = {"learning rate": None, "trained": 0, "loss in training": None}
    return {"method": BASE, **nothing, **scores, "time_s": None, "memory_bytes": None}


def _scores(
    settings: MethodsConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...] | None,
) -> dict[str, float]:
    data = settings.data
    asked = None if settings.task == "auto" else settings.task
    rows = read_rows(
        str(data.validation),
        data,
        limit=data.validation_rows,
        every=data.validation_every,
        split="validation",
        labels=labels,
        task=asked,
    )
    task = asked or rows.task
    found = scored(
        model,
        encode_for(model, active_name(model), rows, tokenizer, data).examples,
        loss=Loss(task),
        collate=Collator(tokenizer),
        batch_size=4 * settings.batch_size,
        names=rows.labels,
    ).scores
    scores = {"held-out loss": found.pop("loss")}
    if task != "generation":
        return scores | {name: 100 * value for name, value in found.items()}
    if settings.answers:
        scores["BLEU"] = _bleu(settings, model, tokenizer, rows)
    return scores


def _bleu(
    settings: MethodsConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
) -> float:
    answered = rows.rows[: settings.answers]
    prompts = [encode_prompt(row, tokenizer, settings.data) for row in answered]
    written = answer(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=25,
        note=lambda text: print(text, file=sys.stderr),
    )
    return bleu(written, [references_of(row) for row in answered])


def _best(rows: list[_Row]) -> list[_Row]:
    """The row of each method with its lowest held-out loss."""
    best: dict[str, _Row] = {}
    for row in rows:
        name = row["method"]
        if name not in best or row["held-out loss"] < best[name]["held-out loss"]:
            best[name] = row
    return list(best.values())

"""Training beside PEFT and full fine-tuning: speed, memory and loss on the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Seconds
from lorakit.bench.startup import first_step
from lorakit.bench.train_chart import check_chart, draw
from lorakit.bench.train_participants import BY_LENGTH, ParticipantTask
from lorakit.bench.train_processes import Record, Rounds, run_rounds
from lorakit.bench.train_rounds import PARTS
from lorakit.bench.train_settings import draw_rows, run_settings, write_rows
from lorakit.config.bench import WARM_UPS, TrainBenchConfig
from lorakit.config.train import TrainConfig

FULL_LEARNING_RATE = 5e-5
"""Peak rate of full fine-tuning: that of an adapter would ruin a model's own weights."""


def measure_train(settings: TrainBenchConfig) -> Findings:
    """Train with every participant in rounds, and compare their speed, memory and losses.

    Raises:
        DataError: there are too few rows, or they have no prompts.
        ConfigError: `ours` has settings that all participants share, or that do not exist.
        TrainingError: a participant could not train.
        MissingExtraError: a chart is to be drawn, and matplotlib is not installed.
        OutputError: the chart cannot be written.
    """
    check_chart(settings.plot)
    rounds = Rounds(
        warm_ups=WARM_UPS,
        counted=settings.repeats,
        steps=settings.steps,
        threads=settings.threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        tasks = _tasks(settings, Path(folder))
        records = run_rounds(tasks, rounds)
        started = _first_steps(settings, tasks[OURS].config)
    rows = [_row(name, record) for name, record in records.items()]
    curves = {name: record.losses for name, record in records.items()}
    if settings.plot is not None:
        title = (
            f"{Path(settings.model).name} in {settings.dtype}, rank {settings.rank} on "
            f"{', '.join(settings.targets)}, {settings.batch_size} rows in a step"
        )
        draw(rows, curves, settings.plot, title=title)
    return Findings(
        timings={**_timings(records, settings.steps), **started},
        goals=(
            *_goals(records, settings),
            *(
                Goal(what="start to first step", got=each[OURS].median, limit=10.0, unit="s")
                for each in started.values()
            ),
        ),
        memory={name: most for name, each in records.items() if (most := each.most_bytes)},
        checks=_checks(records),
        tables={"contestants": rows},
        curves=curves,
    )


def _participants(settings: TrainBenchConfig) -> list[str]:
    """The names of the participants in the order of a round."""
    wanted_of = {
        OURS: True,
        "compiled": settings.compiled and not (settings.ours or {}).get("compile"),
        "peft": settings.peer,
        BY_LENGTH: settings.peer,
        "peft_compiled": settings.peer and settings.compiled,
        "full": settings.full,
    }
    return [name for name, wanted in wanted_of.items() if wanted]


def _tasks(settings: TrainBenchConfig, folder: Path) -> dict[str, ParticipantTask]:
    """The work of each participant, whose rows are written into the folder.

    Raises:
        DataError: there are too few, or they have no prompts.
        ConfigError: `ours` has settings that cannot be used.
    """
    training, held_out = folder / "training.jsonl", folder / "held_out.jsonl"
    tasks = {
        name: ParticipantTask(
            config=run_settings(
                settings,
                rows=training,
                out=folder / name,
                steps=settings.all_steps,
                own=_own_settings(name, settings),
            ),
            held_out=held_out,
            full_learning_rate=FULL_LEARNING_RATE,
        )
        for name in _participants(settings)
    }
    to_train = settings.all_steps * settings.batch_size
    rows = draw_rows(
        settings,
        to_train + settings.held_out,
        what_for=f"{settings.all_steps} steps and {settings.held_out} rows to score",
    )
    write_rows(rows[:to_train], training)
    write_rows(rows[to_train:], held_out)
    return tasks


def _own_settings(name: str, settings: TrainBenchConfig) -> dict[str, Any]:
    """The settings of `lorakit train` that not all participants share."""
    ours = settings.ours or {}
    return {OURS: ours, "compiled": {**ours, "compile": True}}.get(name, {})


def _first_steps(settings: TrainBenchConfig, run: TrainConfig) -> dict[str, dict[str, Seconds]]:
    """The time to the first step of `lorakit train` on all rows, where it is measured."""
    if not settings.starts:
        return {}
    out = run.out.with_name("first_step")
    config = run.model_copy(update={"out": out, "data": settings.data})
    seconds = first_step(config, repeats=settings.starts, threads=settings.threads)
    return {"first_step": {OURS: seconds}}


def _timings(records: Mapping[str, Record], steps: int) -> dict[str, dict[str, Seconds]]:
    """The seconds of a step, and of each of its parts, by participant."""

    def per_step(part: str, record: Record) -> Seconds:
        times = (r.seconds if part == "step" else r.parts[part] for r in record.rounds)
        return Seconds(rounds=tuple(seconds / steps for seconds in times))

    return {
        part: {name: per_step(part, record) for name, record in records.items()}
        for part in ("step", *PARTS)
    }


def _row(name: str, record: Record) -> dict[str, Any]:
    """A participant's line in the table."""
    return {
        "who": name,
        "useful tokens per second": record.tokens_per_s,
        "loaded_bytes": record.ready.used_bytes,
        "above that_bytes": record.above_bytes,
        "first loss": record.losses[0],
        "last loss": record.losses[-1],
        "held-out loss": record.ended.evaluation_loss,
    }


def _checks(records: Mapping[str, Record]) -> dict[str, Any]:
    """Whether all trained on the same batches, and how far our losses are from PEFT's."""
    ours, peft = records[OURS], records.get("peft")
    batches = {record.batch_hashes for name, record in records.items() if name != BY_LENGTH}
    checks: dict[str, Any] = {"same_rows_in_each_step": len(batches) == 1}
    if BY_LENGTH in records:
        checks["same_tokens_by_length"] = records[BY_LENGTH].tokens == ours.tokens
    if peft is not None:
        pairs = zip(ours.losses, peft.losses, strict=True)
        checks["largest_loss_difference_from_peft"] = max(abs(a - b) for a, b in pairs)
    return checks


def _goals(records: Mapping[str, Record], settings: TrainBenchConfig) -> tuple[Goal, ...]:
    """The goals beside each baseline that was measured."""
    ours = records[OURS]
    goals = []
    if "peft" in records:
        goals += _goals_beside_peft(ours, records["peft"], settings)
    if "full" in records:
        goals += _goals_beside_full(ours, records["full"])
    return tuple(goals)


def _goals_beside_peft(ours: Record, peft: Record, settings: TrainBenchConfig) -> list[Goal]:
    few_layers = settings.dtype == "bfloat16" and set(settings.targets) == {"q", "v"}
    goals = [
        Goal(
            what="useful tokens per second against peft",
            got=ours.tokens_per_s / peft.tokens_per_s,
            limit=2.0 if few_layers else 1.6,
            at_least=True,
        )
    ]
    if ours.most_bytes and peft.most_bytes:
        got = ours.most_bytes / peft.most_bytes
        goals.append(Goal(what="memory against peft", got=got, limit=0.6))
    apart = ours.ended.evaluation_loss / peft.ended.evaluation_loss - 1
    what = "held-out loss, difference from peft"
    return [*goals, Goal(what=what, got=100 * abs(apart), limit=1.0, unit="%")]


def _goals_beside_full(ours: Record, full: Record) -> list[Goal]:
    got = ours.tokens_per_s / full.tokens_per_s
    goals = [Goal(what="useful tokens per second against full", got=got, limit=1.4, at_least=True)]
    if ours.above_bytes is not None and full.above_bytes:
        got = ours.above_bytes / full.above_bytes
        goals.append(Goal(what="memory above the weights against full", got=got, limit=1 / 3))
    return goals

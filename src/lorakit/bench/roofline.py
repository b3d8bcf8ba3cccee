"""The roofline: how far each part of a training step is from the limit of the machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.bench.result import OURS, Findings
from lorakit.bench.roofline_ceilings import Ceilings, ceilings
from lorakit.bench.roofline_counts import PARTS, Batch, Shape, Work, count
from lorakit.bench.roofline_profile import REST, ProfiledTrainer, Profiles, Sorter, medians
from lorakit.bench.rounds import Seconds
from lorakit.bench.train_settings import RunSettings, draw_rows, run_settings, write_rows
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.run import Run, execute, while_training

WARM_UPS = 2
"""Steps before the first profile."""
NARROW = 4
"""Products with A or B of up to so many ranks side by side are told from those of the base."""


class RooflineConfig(RunSettings):
    """The step that is looked into; `repeats` is how often."""

    peer: bool = False
    """Nothing of PEFT is measured here."""


def measure_roofline(settings: RooflineConfig) -> Findings:
    """Count the work of a step, measure the machine and the step, and compare.

    Raises:
        DataError: there are too few rows, or they have no prompts.
        ModelError: the model is not built as Llama is.
        ConfigError: `ours` has settings that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared, profiles = _profiled(settings, Path(folder))
    model = prepared.model
    shape, batch = Shape.of(model, prepared.name), Batch.of(prepared.training.examples)
    sorter = Sorter(vocabulary=shape.vocabulary, narrow=NARROW * settings.rank)
    steps = [sorter.seconds(events) for events in profiles.events]
    machine = ceilings(model, batch, repeats=settings.repeats)
    work = count(shape, batch)
    rows = [_row(part, work[part], machine, medians(steps)[part]) for part in PARTS]
    rest = {"part": REST, "measured_s": medians(steps)[REST]}
    return Findings(
        timings={"step": {OURS: Seconds(turns=tuple(sum(step.values()) for step in steps))}},
        tables={"roofline": [*rows, {**dict.fromkeys(rows[0]), **rest}]},
        checks=_checks(prepared, batch, machine, rows),
    )


def _profiled(settings: RooflineConfig, folder: Path) -> tuple[Prepared, Profiles]:
    """Train on one batch again and again, as `lorakit train` does, and profile some steps."""
    rows = folder / "rows.jsonl"
    write_rows(draw_rows(settings, settings.batch_size, what_for="a step"), rows)
    config = run_settings(
        settings,
        rows=rows,
        out=folder / "run",
        steps=WARM_UPS + settings.repeats,
        own=settings.ours,
    )
    prepared = prepare(config)
    Shape.of(prepared.model, prepared.name)
    profiles = Profiles(warm_ups=WARM_UPS, repeats=settings.repeats)
    run = Run(config=config, prepared=prepared, checkpoint=None)
    with while_training(prepared.model, config) as interruption:
        execute(run, interruption, bar=profiles, make_trainer=ProfiledTrainer)
    return prepared, profiles


def _row(part: str, work: Work, machine: Ceilings, measured_s: float) -> dict[str, Any]:
    """A part's line in the table."""
    limit_s = work.seconds(
        operations_per_s=machine.operations_per_s, bytes_per_s=machine.bytes_per_s
    )
    return {
        "part": part,
        "GFLOP": work.operations / 1e9,
        "moved_bytes": work.bytes,
        "limit_s": limit_s,
        "products alone_s": machine.alone_s.get(part),
        "measured_s": measured_s,
        "times its limit": measured_s / limit_s,
    }


def _checks(
    prepared: Prepared, batch: Batch, machine: Ceilings, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what else a reader needs, and the part with the most to gain."""
    lengths = [len(example.input_ids) for example in prepared.training.examples]
    limit_s, measured_s = (sum(row[key] for row in rows) for key in ("limit_s", "measured_s"))
    largest = max(rows, key=lambda row: row["measured_s"] - row["limit_s"])
    gain_s = largest["measured_s"] - largest["limit_s"]
    return {
        "useful_tokens": batch.tokens,
        "labelled_tokens": batch.labelled,
        "tokens_with_padding": len(lengths) * max(lengths),
        "GFLOP_per_second_of_a_large_product": machine.operations_per_s / 1e9,
        "GB_per_second_of_a_large_sum": machine.bytes_per_s / 1e9,
        "step_in_times_of_its_limit": measured_s / limit_s,
        "next_gain": f"{largest['part']}, {gain_s / measured_s:.0%} of the step above its limit",
    }

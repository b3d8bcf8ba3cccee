"""The verb train: an adapter, or with sweep several, from your model and your data."""

from dataclasses import asdict
from typing import Any

from lorakit.cli.verbs import Result
from lorakit.config.train import TrainConfig
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.run import loss_through, train
from lorakit.training.sweep.report import figures
from lorakit.training.sweep.sweep import describe, prepare_sweep, sweep


def run(settings: TrainConfig) -> Result:
    """Train, or with dry_run only show what would be adapted and read."""
    if settings.sweep is not None:
        return _dry_sweep(settings) if settings.dry_run else _sweep(settings)
    if settings.dry_run:
        prepared = prepare(settings)
        loss_through(prepared, settings.preference)
        return Result(text=prepared.describe(settings.table), data=_data(prepared))
    result = train(settings, progress=True, table=True)
    lines = [
        f"trained {result.parameters:,} parameters in {result.steps} steps, {result.seconds:.0f} s",
        f"training loss {result.first_loss:.3f} at the start, {result.last_loss:.3f} at the end",
    ]
    if result.padding:
        lines.append(f"{result.padding:.0%} of the tokens in training batches were padding")
    lines += [f"validation {name} {value:.4f}" for name, value in result.scores.items()]
    lines.append(f"adapter in {result.out}")
    data: dict[str, Any] = {**asdict(result), "out": str(result.out)}
    return Result(text="\n".join(lines), data=data)


def _data(prepared: Prepared) -> dict[str, Any]:
    return {
        "parameters": prepared.plan.parameters,
        "sites": [vars(site) for site in prepared.plan.sites],
        "rows": len(prepared.training),
    }


def _dry_sweep(settings: TrainConfig) -> Result:
    prepared = prepare_sweep(settings)
    data = {name: _data(each) for name, each in prepared.items()}
    return Result(text=describe(prepared, settings.table), data={"members": data})


def _sweep(settings: TrainConfig) -> Result:
    result = sweep(settings, progress=True, table=True)
    text = f"{result.summary}\nadapters, figures and plot in {result.out}"
    return Result(text=text, data={**figures(result), "out": str(result.out)})

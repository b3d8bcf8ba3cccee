"""The verb train: an adapter from your model and your data."""

from typing import Any

from lorakit.cli.verbs import Result
from lorakit.config import Settings, TrainConfig
from lorakit.train.prepare import prepare
from lorakit.train.run import train

SETTINGS: type[Settings] = TrainConfig


def run(settings: TrainConfig) -> Result:
    """Train, or with dry_run only show what would be adapted and read."""
    if settings.dry_run:
        prepared = prepare(settings)
        return Result(
            text=str(prepared),
            data={
                "parameters": prepared.plan.parameters,
                "sites": [vars(match.site) for match in prepared.plan.matches],
                "rows": len(prepared.training),
            },
        )
    result = train(settings, progress=True, table=True)
    lines = [
        f"trained {result.parameters:,} parameters in {result.steps} steps, {result.seconds:.0f} s",
        f"training loss {result.first_loss:.3f} at the start, {result.last_loss:.3f} at the end",
    ]
    lines += [f"validation {name} {value:.4f}" for name, value in result.scores.items()]
    lines.append(f"adapter in {result.out}")
    data: dict[str, Any] = {**vars(result), "out": str(result.out)}
    return Result(text="\n".join(lines), data=data)

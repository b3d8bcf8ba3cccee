"""The checkpoints of a training run, by the steps after which they were saved."""

from __future__ import annotations

from pathlib import Path


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    return sorted((each for each in found if _step(each).isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(_step(checkpoint))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]

"""The time from the start of a process `lorakit train` to the end of its first step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from lorakit.bench.rounds import Seconds
from lorakit.config.train import TrainConfig
from lorakit.errors import TrainingError

LOOK_EVERY_S = 0.01
"""Seconds between two reads of the run's log: the error of a measurement."""


def first_step(config: TrainConfig, *, repeats: int, threads: int | None) -> Seconds:
    """The times from the start of a run to its first step; each run ends there.

    Args:
        config: the run; its `out` is a folder that does not exist, in one that does.
        repeats: how many runs, one after the other.
        threads: threads of torch in them. None: as many as torch takes by itself.

    Raises:
        TrainingError: a run ended before its first step.
    """
    settings = config.out.with_suffix(".yaml")
    # YAML reads JSON.
    overwriting = config.model_copy(update={"overwrite": True})
    settings.write_text(overwriting.model_dump_json(), encoding="utf-8")
    return Seconds(rounds=tuple(_once(settings, config.out, threads) for _ in range(repeats)))


def _once(settings: Path, out: Path, threads: int | None) -> float:
    log = out / "log.jsonl"
    log.unlink(missing_ok=True)
    printed = settings.with_suffix(".txt")
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    with printed.open("w", encoding="utf-8") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "lorakit.cli", "train", str(settings)],
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            while not _has_lines(log):
                if process.poll() is not None and not _has_lines(log):
                    lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
                    reason = "\n".join(lines[-5:])
                    raise TrainingError(f"a run ended before its first step:\n{reason}")
                time.sleep(LOOK_EVERY_S)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()


def _has_lines(log: Path) -> bool:
    """Whether a step was logged: a run's log begins empty, and its first line is the first step."""
    return log.is_file() and log.stat().st_size > 0

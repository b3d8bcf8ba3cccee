"""How long a server takes until it takes requests, beside loading its base alone."""

from __future__ import annotations

import os
import subprocess
import sys

from lorakit.bench.result import OURS, Goal
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.bench.serving.process import running
from lorakit.config.bench import ServeBenchConfig

LOAD = "import sys; from lorakit.models.load import load_model; load_model(sys.argv[1], dtype={!r})"
"""What a process does that loads the base and ends."""


def starts(settings: ServeBenchConfig) -> dict[str, Seconds]:
    """The times of processes from their start: until the server answers, until the base is loaded.

    The first round, in which files are read from the disk, does not count.
    """
    how = ["--model", settings.model, "--name", "base", "--dtype", settings.dtype]

    def serve() -> None:
        with running(how, threads=settings.threads) as server:
            taken.append(server.start_s)

    threads = {} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}

    def load() -> None:
        command = [sys.executable, "-c", LOAD.format(settings.dtype), settings.model]
        subprocess.run(command, check=True, env={**os.environ, **threads})

    taken: list[float] = []
    loads = interleaved(
        {"load_model": Participant(run=load, before=serve)}, repeats=settings.starts
    )
    # That a server ends is not part of its start.
    return {OURS: Seconds(rounds=tuple(taken[1:])), **loads}


def start_goal(times: dict[str, Seconds]) -> Goal:
    """The time until a server answers, over that of loading its base."""
    return Goal(
        what="start to the first answer, warm, over load_model in a process of its own",
        got=times[OURS].median / times["load_model"].median,
        limit=1.3,
    )

"""Contestants that train in turns, each in a process of its own, as it would train alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import TypeVar

from lorakit.bench.result import threads
from lorakit.bench.train_baselines import CONTESTANTS, Task
from lorakit.bench.train_clock import Ended, Failed, Gate, Ready, Turn
from lorakit.errors import LorakitError, TrainingError

Said = TypeVar("Said", Ready, Turn, Ended)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the contestants take turns."""

    warm_ups: int
    """Turns that do not count: the first steps compile, allocate and fill caches."""
    turns: int
    """Turns that count."""
    steps: int
    """Steps of one turn."""
    threads: int | None
    """Threads of torch. None: as many as torch takes by itself."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one contestant did."""

    ready: Ready
    warm_ups: tuple[Turn, ...]
    turns: tuple[Turn, ...]
    """Those that count."""
    ended: Ended

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of every step."""
        return tuple(loss for turn in (*self.warm_ups, *self.turns) for loss in turn.losses)

    @property
    def rows(self) -> tuple[int, ...]:
        """Return what tells the rows of every step from others."""
        return tuple(row for turn in (*self.warm_ups, *self.turns) for row in turn.rows)

    @property
    def tokens_per_s(self) -> float:
        """The median of the turns' useful tokens per second."""
        return statistics.median(turn.tokens / turn.seconds for turn in self.turns)

    @property
    def most_bytes(self) -> int | None:
        """The most memory that was used while training."""
        return self.turns[-1].most_bytes

    @property
    def above_bytes(self) -> int | None:
        """Return how much of it came on top of what was loaded."""
        most, used = self.most_bytes, self.ready.used_bytes
        return None if most is None or used is None else most - used


def race(tasks: Mapping[str, Task], plan: Plan) -> dict[str, Record]:
    """Return what each contestant did: all have their first turn, then all their second, …

    Raises:
        TrainingError: one of them could not train.
    """
    with ExitStack() as stack:
        entered, ready = {}, {}
        for way, task in tasks.items():
            entered[way] = stack.enter_context(_contestant(way, task, plan))
            ready[way] = entered[way].hear(Ready)
        turns = [
            {way: each.take(Turn) for way, each in entered.items()}
            for _ in range(plan.warm_ups + plan.turns)
        ]
        ended = {way: each.take(Ended) for way, each in entered.items()}
    return {
        way: Record(
            ready=ready[way],
            warm_ups=tuple(each[way] for each in turns[: plan.warm_ups]),
            turns=tuple(each[way] for each in turns[plan.warm_ups :]),
            ended=ended[way],
        )
        for way in tasks
    }


@dataclass(frozen=True, kw_only=True)
class _Contestant:
    """Our end of the pipe to one that trains."""

    way: str
    connection: Connection

    def take(self, kind: type[Said]) -> Said:
        """Let it go on, and return what it says at its next stop."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send("go")
        return self.hear(kind)

    def hear(self, kind: type[Said]) -> Said:
        """Return what it says next.

        Raises:
            TrainingError: it cannot go on.
        """
        try:
            said = self.connection.recv()
        except EOFError:
            said = Failed(reason="its process has ended before its work was done")
        if isinstance(said, Failed):
            raise TrainingError(f"{self.way} could not be measured: {said.reason}")
        assert isinstance(said, kind)
        return said


@contextmanager
def _contestant(way: str, task: Task, plan: Plan) -> Iterator[_Contestant]:
    """Let a contestant load what it needs, and end it when the block does."""
    own, others = multiprocessing.Pipe()
    work = _start(way, task, plan, others)
    try:
        yield _Contestant(way=way, connection=own)
    finally:
        # It ends by itself when it next wants to speak or listen.
        own.close()
        work.join()


def _start(way: str, task: Task, plan: Plan, connection: Connection) -> BaseProcess | Thread:
    """Start a contestant in a fresh process, whose memory is its own."""
    afresh = multiprocessing.get_context("spawn")
    process = afresh.Process(target=_alone, args=(way, task, plan, connection), daemon=True)
    process.start()
    connection.close()
    return process


def _alone(way: str, task: Task, plan: Plan, connection: Connection) -> None:
    # Ctrl-C reaches all processes; the one that was started by the user ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(way, task, plan, connection)


def serve(way: str, task: Task, plan: Plan, connection: Connection) -> None:
    """Be a contestant: train when the other end of a pipe says so, and tell it what it took."""
    gate = Gate(connection, steps=plan.steps)
    # The other end has gone where nothing can be sent or heard any more.
    with connection, threads(plan.threads), contextlib.suppress(EOFError, BrokenPipeError):
        try:
            loss = CONTESTANTS[way](task, gate)
        except LorakitError as error:
            connection.send(Failed(reason=str(error)))
        else:
            connection.send(Ended(evaluation_loss=loss))

"""Participants that train in rounds, each in a process of its own, as it would train alone.

The processes all live from the first round to the last. Pipes let one of them train at a time.
"""

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
from lorakit.bench.train_participants import PARTICIPANTS, ParticipantTask
from lorakit.bench.train_rounds import Ended, Failed, Gate, Ready, Round
from lorakit.errors import LorakitError, TrainingError

Message = TypeVar("Message", Ready, Round, Ended)


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many rounds there are, and of how many steps."""

    warm_ups: int
    """Rounds that do not count: the first steps compile, allocate and fill caches."""
    counted: int
    """Rounds that count."""
    steps: int
    """Steps that each participant takes in a round."""
    threads: int | None
    """Threads of torch. None: as many as torch takes by itself."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The measurements of one participant, from its start to its end."""

    ready: Ready
    warm_ups: tuple[Round, ...]
    rounds: tuple[Round, ...]
    """Those that count."""
    ended: Ended

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of every step."""
        return tuple(loss for each in (*self.warm_ups, *self.rounds) for loss in each.losses)

    @property
    def batch_hashes(self) -> tuple[int, ...]:
        """The hash of every step's batch."""
        return tuple(h for each in (*self.warm_ups, *self.rounds) for h in each.batch_hashes)

    @property
    def tokens(self) -> int:
        """The useful tokens of all steps."""
        return sum(each.tokens for each in (*self.warm_ups, *self.rounds))

    @property
    def tokens_per_s(self) -> float:
        """Useful tokens per second, the median over the rounds."""
        return statistics.median(each.tokens / each.seconds for each in self.rounds)

    @property
    def most_bytes(self) -> int | None:
        """The peak of memory while training."""
        return self.rounds[-1].most_bytes

    @property
    def above_bytes(self) -> int | None:
        """The part of the peak that came on top of what was loaded."""
        most, used = self.most_bytes, self.ready.used_bytes
        return None if most is None or used is None else most - used


def run_rounds(tasks: Mapping[str, ParticipantTask], rounds: Rounds) -> dict[str, Record]:
    """The record of each participant, after all of them have trained in rounds.

    Raises:
        TrainingError: one of them could not train.
    """
    with ExitStack() as stack:
        processes, ready = {}, {}
        for name, task in tasks.items():
            processes[name] = stack.enter_context(_started(name, task, rounds))
            ready[name] = processes[name].receive(Ready)
        done = [
            {name: process.resume(Round) for name, process in processes.items()}
            for _ in range(rounds.warm_ups + rounds.counted)
        ]
        ended = {name: process.resume(Ended) for name, process in processes.items()}
    return {
        name: Record(
            ready=ready[name],
            warm_ups=tuple(each[name] for each in done[: rounds.warm_ups]),
            rounds=tuple(each[name] for each in done[rounds.warm_ups :]),
            ended=ended[name],
        )
        for name in tasks
    }


@dataclass(frozen=True, kw_only=True)
class _Process:
    """A participant's process, seen through the parent's end of their pipe."""

    name: str
    connection: Connection

    def resume(self, kind: type[Message]) -> Message:
        """Let it go on, and return its next message."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send("go")
        return self.receive(kind)

    def receive(self, kind: type[Message]) -> Message:
        """Its next message.

        Raises:
            TrainingError: it cannot go on.
        """
        try:
            message = self.connection.recv()
        except EOFError:
            message = Failed(reason="its process has ended before its work was done")
        if isinstance(message, Failed):
            raise TrainingError(f"{self.name} could not be measured: {message.reason}")
        assert isinstance(message, kind)
        return message


@contextmanager
def _started(name: str, task: ParticipantTask, rounds: Rounds) -> Iterator[_Process]:
    """A participant's process, which loads what it needs, and ends with the block."""
    own, others = multiprocessing.Pipe()
    work = _start(name, task, rounds, others)
    try:
        yield _Process(name=name, connection=own)
    finally:
        # With its pipe closed, it ends when it next sends or receives.
        own.close()
        work.join()


def _start(
    name: str, task: ParticipantTask, rounds: Rounds, connection: Connection
) -> BaseProcess | Thread:
    """Start a participant in a fresh process, whose memory is its own."""
    afresh = multiprocessing.get_context("spawn")
    process = afresh.Process(
        target=_serve_alone, args=(name, task, rounds, connection), daemon=True
    )
    process.start()
    connection.close()
    return process


def _serve_alone(name: str, task: ParticipantTask, rounds: Rounds, connection: Connection) -> None:
    """The whole work of a participant's process."""
    # Ctrl-C reaches all processes; the one that was started by the user ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(name, task, rounds, connection)


def serve(name: str, task: ParticipantTask, rounds: Rounds, connection: Connection) -> None:
    """Train as one participant, round by round as the other end of the pipe allows it."""
    gate = Gate(connection, steps=rounds.steps)
    # Nothing can be sent or received once the other end is closed.
    with connection, threads(rounds.threads), contextlib.suppress(EOFError, BrokenPipeError):
        try:
            loss = PARTICIPANTS[name](task, gate)
        except LorakitError as error:
            connection.send(Failed(reason=str(error)))
        else:
            connection.send(Ended(evaluation_loss=loss))

"""Training in turns: a Trainer that stops after some steps, and tells what took how long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lorakit.bench.memory import forget_peak, most_bytes, used_bytes
from lorakit.data.encode import Example
from lorakit.training.batch_trainer import BatchTrainer
from lorakit.training.trainer import AdapterTrainer

PARTS = ("data", "forward", "backward", "optimizer", "rest")
"""What a step is made of; `rest` is Trainer's own work between the others."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Some steps in a row of one contestant."""

    parts: dict[str, float]
    """Seconds by part of the step; their sum is the time of the turn."""
    losses: tuple[float, ...]
    """Mean loss of the labelled tokens of each step."""
    tokens: int
    """Tokens of the rows, prompts and completions, without padding."""
    rows: tuple[int, ...]
    """For each step a number that tells its rows, in any order, from others."""
    most_bytes: int | None
    """The most memory since `Ready`."""

    @property
    def seconds(self) -> float:
        """The time of the turn."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Everything is loaded, and the first step can begin."""

    used_bytes: int | None
    """Memory at that moment."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The work cannot go on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """All turns are over."""

    evaluation_loss: float
    """Mean loss of the labelled tokens of the held-out rows."""


class Clock:
    """Charges the time that passes to one part of a step after the other."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._part = "rest"
        self.restart()

    def restart(self) -> None:
        """Forget all that was charged."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = self._read()

    def switch(self, part: str) -> str:
        """Charge what follows to another part, and return the one before."""
        before, read = self._part, self._read()
        self.seconds[before] += read - self._since
        self._part, self._since = part, read
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens in a block to a part, but for what an inner block has."""
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def _read(self) -> float:
        # A GPU works on after a call has returned, and would be charged to the next part.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._now()


class Gate(TrainerCallback):
    """Lets a run take so many steps at a time, when the other end of a pipe says so."""

    def __init__(self, connection: Connection, *, steps: int) -> None:
        self._connection = connection
        self._steps = steps
        self.clock = Clock()
        self.losses: list[Tensor] = []
        self.coming: deque[tuple[int, int]] = deque()
        """Tokens and rows of the batches that are collated and not yet trained on."""
        self._done: list[tuple[int, int]] = []

    def counted(self, collate: Callable[[Sequence[Example]], Any]) -> Callable[..., Any]:
        """A collator that also notes the tokens and the rows of each batch."""

        def collated(examples: Sequence[Example]) -> Any:
            ids = [tuple(example.input_ids) for example in examples]
            self.coming.append((sum(map(len, ids)), hash(tuple(sorted(ids)))))
            return collate(examples)

        return collated

    def step_begins(self) -> None:
        """Note that the oldest collated batch is trained on."""
        self._done.append(self.coming.popleft())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that all is ready, and wait for the first turn."""
        forget_peak()
        self._connection.send(Ready(used_bytes=used_bytes()))
        self._wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell of a turn that is over, and wait for the next."""
        self.clock.switch("rest")
        if state.global_step % self._steps:
            return
        self._connection.send(self._turn())
        # After the last turn too: what follows would disturb those who still have theirs.
        self._wait()

    def _turn(self) -> Turn:
        turn = Turn(
            parts=self.clock.seconds,
            losses=tuple(loss.item() for loss in self.losses),
            tokens=sum(tokens for tokens, _ in self._done),
            rows=tuple(rows for _, rows in self._done),
            most_bytes=most_bytes(),
        )
        self.losses, self._done = [], []
        return turn

    def _wait(self) -> None:
        self._connection.recv()
        self.clock.restart()


class _Clocked:
    """What makes a Trainer measure itself; stands before it among the bases of a class."""

    def __init__(self, *, gate: Gate, data_collator: Any, **kwargs: Any) -> None:
        kwargs["data_collator"] = gate.counted(data_collator)
        super().__init__(**kwargs)
        self._gate = gate
        self.add_callback(gate)  # type: ignore[attr-defined]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self._gate.clock.part("data"):
            return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._gate.step_begins()
        with self._gate.clock.part("backward"):
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        # Until the gate hears of the step's end.
        self._gate.clock.switch("optimizer")
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._gate.clock.part("forward"):
            result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._gate.losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result


class ClockedTrainer(_Clocked, Trainer):
    """transformers' Trainer, in turns."""


class ClockedBatchTrainer(_Clocked, BatchTrainer):
    """transformers' Trainer on our batches, in turns."""


class ClockedAdapterTrainer(_Clocked, AdapterTrainer):
    """The trainer of `lorakit train`, in turns."""

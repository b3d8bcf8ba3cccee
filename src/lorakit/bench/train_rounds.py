"""Training in rounds: a Trainer that pauses after some steps, and reports the time of each part."""

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
from lorakit.data.length_sampler import ByLength
from lorakit.data.samples import Example
from lorakit.training.batch_trainer import BatchTrainer
from lorakit.training.trainer import AdapterTrainer

PARTS = ("data", "forward", "backward", "optimizer", "rest")
"""The parts of a step; `rest` is Trainer's own work between the others."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """The steps of one participant in one round."""

    parts: dict[str, float]
    """Seconds by part of the step; their sum is the time of the round."""
    losses: tuple[float, ...]
    """Mean loss of the target tokens of each step."""
    tokens: int
    """Tokens of prompts and completions, without padding."""
    batch_hashes: tuple[int, ...]
    """The hash of each step's batch: of its sequences of token ids, whatever their order."""
    most_bytes: int | None
    """The peak of memory since `Ready`."""

    @property
    def seconds(self) -> float:
        """The time of the round."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The message that everything is loaded, and the first step can begin."""

    used_bytes: int | None
    """The memory in use then."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The message that a participant cannot go on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The message that all rounds are done."""

    evaluation_loss: float
    """Mean loss of the target tokens of the held-out rows."""


class Clock:
    """A stopwatch that charges all time to the part of the step that is running."""

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
        """Charge the time of a block to a part, except that of the blocks inside it."""
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def _read(self) -> float:
        # A GPU works on after a call has returned; its time would be charged to the next part.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._now()


class Gate(TrainerCallback):
    """A callback that pauses training after each round until the other end of a pipe says "go"."""

    def __init__(self, connection: Connection, *, steps: int) -> None:
        self._connection = connection
        self._steps = steps
        self.clock = Clock()
        self.losses: list[Tensor] = []
        self.coming: deque[tuple[int, int]] = deque()
        """Number of tokens and hash of each batch that is collated and not yet trained on."""
        self._done: list[tuple[int, int]] = []

    def counted(self, collate: Callable[[Sequence[Example]], Any]) -> Callable[..., Any]:
        """A collator that also notes each batch's number of tokens and its hash."""

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
        """Send `Ready`, and wait for the first round."""
        forget_peak()
        self._connection.send(Ready(used_bytes=used_bytes()))
        self._wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the end of a round, send it and wait for the next."""
        self.clock.switch("rest")
        if state.global_step % self._steps:
            return
        self._connection.send(self._round())
        # After the last round too: what follows would disturb those that still train.
        self._wait()

    def _round(self) -> Round:
        finished = Round(
            parts=self.clock.seconds,
            losses=tuple(loss.item() for loss in self.losses),
            tokens=sum(tokens for tokens, _ in self._done),
            batch_hashes=tuple(batch_hash for _, batch_hash in self._done),
            most_bytes=most_bytes(),
        )
        self.losses, self._done = [], []
        return finished

    def _wait(self) -> None:
        self._connection.recv()
        self.clock.restart()


class _Clocked:
    """The measuring half of a Trainer, for a class that inherits from it first, then a Trainer."""

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
    """transformers' Trainer, in rounds."""


class ClockedLengthTrainer(ClockedTrainer):
    """transformers' Trainer with rows of similar length in a batch, in rounds.

    Trainer's own `group_by_length` sorts pools of 50 batches, but a quarter of the rows at most:
    of as few as a benchmark has, much more would be padding than of a whole data set.
    """

    def _get_train_sampler(self, *args: Any) -> ByLength:
        lengths = [len(example.input_ids) for example in self.train_dataset]  # type: ignore
        return ByLength(lengths, batch_size=self.args.train_batch_size, seed=self.args.seed)


class ClockedBatchTrainer(_Clocked, BatchTrainer):
    """transformers' Trainer on our batches, in rounds."""


class ClockedAdapterTrainer(_Clocked, AdapterTrainer):
    """The trainer of `lorakit train`, in rounds."""

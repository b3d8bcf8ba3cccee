"""Checks of a run while it trains: parameters without a gradient, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.errors import TrainingError
from lorakit.training.processes import any_says


class UntrainedParts(TrainerCallback):
    """Stops a run in which a parameter of the adapter never gets a gradient, or a B stays zero."""

    def __init__(self, trained: Mapping[str, nn.Parameter], *, check_after: int) -> None:
        self._trained = trained
        self._check_after = check_after
        self._alive: set[str] = set()
        self._steps = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which parameters have a gradient; after the step it is gone."""
        if self._steps > self._check_after:
            return
        for name, parameter in self._trained.items():
            gradient = parameter.grad
            if gradient is not None and bool(gradient.any()):
                self._alive.add(name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once, after enough steps for A to get a gradient through B."""
        self._steps += 1
        if self._steps == self._check_after:
            dead = self._dead()
            if dead:
                raise TrainingError.listing(
                    f"after {self._steps} steps some parts have not trained: are they used by the "
                    "model's forward? Leave them out with exclude, or set allow_untrained",
                    dead,
                )

    def _dead(self) -> list[str]:
        found = []
        for name, parameter in self._trained.items():
            if name not in self._alive:
                found.append(f"{name}  has had no gradient")
            elif name.endswith(".lora_b") and not parameter.detach().any():
                found.append(f"{name}  is still zero")
        return found


class Interruption(TrainerCallback):
    """Finishes the step at Ctrl-C or SIGTERM, saves a checkpoint, and stops the run.

    A second Ctrl-C stops at once. A second SIGTERM does not: SLURM sends it to all processes of a
    job, and torchrun, which gets it too, sends it on to those that it has started.
    """

    def __init__(self) -> None:
        self.happened = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # Only the main thread may; elsewhere the default stays.
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.happened and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.happened = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a checkpoint and the end of the run, if a signal came to any process."""
        self.happened = any_says(self.happened)
        if self.happened:
            control.should_save = True
            control.should_training_stop = True
        return control

"""Where the time of a training step goes: torch's profile of it, summed over parts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import FunctionEvent
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.bench.roofline_counts import PARTS
from lorakit.training.trainer import AdapterTrainer

REST = "rest"
"""Python, and whatever torch does between its operators."""
FORWARD = "lorakit.forward"
OPTIMIZER = "Optimizer.step"
"""How the name of the event begins that torch's optimizers make of a step."""
PRODUCTS = ("mm", "linear", "linear_pointwise", "matmul")
"""Ends of the names of operators that multiply matrices."""
ATTENTION = ("attention", "sdp", "bmm")
"""What the names of operators of the attention have in them."""


class ProfiledTrainer(AdapterTrainer):
    """The trainer of `lorakit train`, whose forward pass can be told in a profile."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, under a name."""
        with record_function(FORWARD):
            return super().compute_loss(*args, **kwargs)


@dataclass
class Profiles(TrainerCallback):
    """Profiles some steps, each by itself, after some that only warm up."""

    warm_ups: int
    repeats: int
    events: list[list[FunctionEvent]] = field(default_factory=list)
    """The events of each profiled step."""
    running: profile | None = None
    """The profile of the step that is being taken."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the profile of this step, and begin that of the next."""
        if self.running is not None:
            self.running.__exit__(None, None, None)
            self.events.append(list(self.running.function_events or ()))
            self.running = None
        if self.warm_ups <= state.global_step < self.warm_ups + self.repeats:
            self.running = _profile()
            self.running.__enter__()


def _profile() -> profile:
    """A profile of the CPU, and of the GPU where there is one."""
    # torch's profiler writes lines to stderr that nobody asked for, unless this is set before it
    # first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = "cuda" if torch.cuda.is_available() else None
    return profile(record_shapes=True, use_kineto=True, use_device=device)


@dataclass(frozen=True, kw_only=True)
class Sorter:
    """Tells which part of a step an operator belongs to."""

    vocabulary: int
    narrow: int
    """No layer of the base is this narrow, and no product with A or B has all sides wider."""

    def seconds(self, events: Sequence[FunctionEvent]) -> dict[str, float]:
        """Return what each part of one step took; they sum up to the time of the step."""
        found = dict.fromkeys((*PARTS, REST), 0.0)
        forward, optimizer = (_spans(events, name) for name in (FORWARD, OPTIMIZER))
        for event in events:
            # The others are names of blocks of code, and autograd's own work between operators.
            if "::" in event.name and not event.name.startswith("autograd::"):
                where = event.time_range.start
                if _within(where, optimizer):
                    part = "optimizer"
                else:
                    part = self.part_of(event, is_forward=_within(where, forward))
                found[part] += _self_us(event) / 1e6
        begun = min(event.time_range.start for event in events)
        ended = max(event.time_range.end for event in events)
        found[REST] = max((ended - begun) / 1e6 - sum(found.values()), 0.0)
        return found

    def part_of(self, event: FunctionEvent, *, is_forward: bool) -> str:
        """The part of an operator outside of the optimizer's step."""
        name = event.name.rpartition("::")[2].strip("_").removesuffix("_backward").lower()
        if any(word in name for word in ATTENTION):
            return "attention"
        if not name.endswith(PRODUCTS):
            return "elementwise"
        shapes: Any = event.input_shapes or ()
        sides = {side for shape in shapes if len(shape) == 2 for side in shape}
        if self.vocabulary in sides:
            return "head"
        if any(side <= self.narrow for side in sides):
            return "adapters"
        return "blocks forward" if is_forward else "blocks backward"


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each part over some steps."""
    return {part: statistics.median(step[part] for step in steps) for part in steps[0]}


def _spans(events: Sequence[FunctionEvent], name: str) -> list[tuple[float, float]]:
    """Return begin and end of the events whose name begins with a word, in microseconds."""
    ranges = (event.time_range for event in events if event.name.startswith(name))
    return [(span.start, span.end) for span in ranges]


def _within(moment: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(begun <= moment <= ended for begun, ended in spans)


def _self_us(event: FunctionEvent) -> float:
    """The time of an operator without those that it calls, in microseconds."""
    if torch.cuda.is_available():
        return event.self_device_time_total
    return event.self_cpu_time_total

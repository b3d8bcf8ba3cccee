"""Decode steps on a GPU that are recorded once as a CUDA graph, and then played.

An eager step of a small model is a thousand launches, which take the processor longer than the GPU
needs for what they start; a recorded one is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.serving.decoder import Decoder
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.kv_slots import KeyValueSlots
from lorakit.serving.steps import OTHERS, ProvenSteps, Shapes

Record: TypeAlias = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a computation one that is repeated, on what its inputs then hold."""

WARM = 3
"""Steps before the recorded one, in which libraries choose their kernels."""


def cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a computation on the GPU; what it reads and gives stays in its place."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Another thread may load an adapter meanwhile, and ask for memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = compute()

    def played() -> Tensor:
        graph.replay()
        return found.clone()

    return played


class GraphedSteps(ProvenSteps):
    """Plays recorded decode steps; eager are those that can't be recorded.

    A step of new shapes is recorded, and used from then on if it has the logits of an eager one.

    Args:
        decoder: calls the model.
        slots: A and B of the rows.
        keys_and_values: of the rows.
        note: is told what could not be recorded.
        record: makes a computation one that is repeated.

    Raises:
        ModelError: the model's layers see windows, which move on from step to step.
    """

    form = "recorded"
    making = "recording"

    def __init__(
        self,
        decoder: Decoder,
        slots: HeldSlots,
        keys_and_values: KeyValueSlots,
        *,
        note: Callable[[str], None],
        record: Record = cuda_graph,
    ) -> None:
        super().__init__(decoder, slots, keys_and_values, note=note)
        if decoder.has_windows:
            raise ModelError("its layers see windows of tokens, which a graph would not move")
        self._record = record
        self._graphs: dict[Shapes, _RecordedStep] = {}

    def step(self, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """The logits (rows, vocabulary) after one token more of each of the first slots."""
        if self._slots.has_others(used):
            return self._counted(OTHERS, tokens)
        self._states.make_room(1 + max(self._states.lengths))
        columns = self._states.columns
        shapes = Shapes(self._padded(len(tokens)), columns, columns, self._slots.layout)
        if shapes in self._refused:
            return self._counted(self._refused[shapes], tokens)
        try:
            if shapes not in self._graphs:
                return self._proven(shapes, tokens, used)
            logits = self._graphs[shapes].step(tokens)
        except Exception as error:
            self._graphs.pop(shapes, None)
            self._refuse(shapes, error)
            return self._counted(self._refused[shapes], tokens)
        self.counts[self.form] += 1
        return logits

    def _proven(self, shapes: Shapes, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """A step both ways; it is played from now on if they are equal to rounding.

        Raises:
            ModelError: they are not.
        """
        for other in [each for each in self._graphs if each.layout != shapes.layout]:
            # Its A and B are no longer those of the slots.
            del self._graphs[other]
        made = _RecordedStep(self._decoder, self._slots, self._states, shapes.rows, self._record)
        expected = self._compared(made.step(tokens), tokens, used)
        self._graphs[shapes] = made
        return expected


class _RecordedStep:
    """A step of the first slots whose tensors are in the same places each time."""

    def __init__(
        self,
        decoder: Decoder,
        slots: HeldSlots,
        states: KeyValueSlots,
        rows: int,
        record: Record,
    ) -> None:
        self._decoder, self._slots, self._states = decoder, slots, states
        self._rows, self._record = rows, record
        make: dict[str, Any] = {"dtype": torch.long, "device": decoder.model.device}
        self._ids, self._positions = torch.zeros(rows, 1, **make), torch.zeros(rows, 1, **make)
        self._mask = torch.zeros(rows, states.columns, **make)
        self._column = torch.zeros(1, **make)
        self._play: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """The logits after one token more of each; the first step is recorded."""
        cache, mask, positions = self._states.begin_in_place(self._rows, self._column)
        more = [0] * (self._rows - len(tokens))
        self._ids.copy_(torch.tensor([*tokens, *more])[:, None])
        self._positions.copy_(torch.tensor(positions)[:, None])
        self._mask.copy_(mask)

        def compute() -> Tensor:
            with self._slots.used(0, self._rows):
                return self._decoder.in_place(self._ids, cache, self._mask, self._positions)

        if self._play is None:
            self._play = self._record(compute)
        return self._play()[: len(tokens)]

"""Decode steps in compiled code, and eager ones until there is some for their shapes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorakit.attachment.state import attachment_for
from lorakit.kernels.few_rows import few_rows
from lorakit.layers.route import Frame
from lorakit.serving.compiled_blocks import (
    BlockCompiler,
    BlockSteps,
    Compile,
    CompiledBlock,
    Recorded,
)
from lorakit.serving.decoder import Decoder
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.kv_slots import KeyValueSlots, window_for
from lorakit.serving.steps import OTHERS, ProvenSteps, Shapes

TURN_S = 5e-5
"""How long the compiler keeps the interpreter from a thread that wants it; Python's own 5 ms would
be added to each of a step's thousand operations."""


class CompiledSteps(ProvenSteps):
    """Computes decode steps in compiled code, and eagerly until there is some for their shapes.

    The code is made in a thread of its own, one kind of step after the other, and used once a step
    of it has the logits of an eager one. Whatever goes wrong ends in an eager step.

    Args:
        decoder: calls the model.
        slots: A and B of the rows.
        keys_and_values: of the rows.
        note: is told what could not be compiled.
        compile_one: makes a graph into code.
        stop: has it end at once.
    """

    form = "compiled"
    making = "compiling"

    def __init__(
        self,
        decoder: Decoder,
        slots: HeldSlots,
        keys_and_values: KeyValueSlots,
        *,
        note: Callable[[str], None],
        compile_one: Compile,
        stop: threading.Event,
    ) -> None:
        super().__init__(decoder, slots, keys_and_values, note=note)
        self._compile, self._stop = compile_one, stop
        self._blocks = BlockSteps(decoder.model)
        self._twin = Decoder(cast(PreTrainedModel, self._blocks.model))
        self._code: dict[Shapes, Mapping[str, CompiledBlock]] = {}
        """What is proven."""
        self._unproven: dict[Shapes, Mapping[str, CompiledBlock]] = {}
        self._building: tuple[Shapes, threading.Thread] | None = None
        self._built: Mapping[str, CompiledBlock] | Exception | None = None

    def step(self, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """The logits (rows, vocabulary) after one token more of each of the first slots."""
        if self._slots.has_others(used):
            return self._counted(OTHERS, tokens)
        shapes = self._shapes(len(tokens))
        try:
            if shapes in self._refused:
                return self._counted(self._refused[shapes], tokens)
            if shapes in self._code:
                logits = self._run(self._code[shapes], shapes, tokens)
                self.counts[self.form] += 1
                return logits
            return self._toward(shapes, tokens, used)
        except Exception as error:
            self._code.pop(shapes, None)
            self._refuse(shapes, error)
            return self._counted(self._refused[shapes], tokens)

    def _shapes(self, rows: int) -> Shapes:
        """The shapes of a step of the first slots, for which there is room afterwards."""
        window = window_for(max(self._states.lengths))
        self._states.make_room(window)
        return Shapes(self._padded(rows), window, self._states.columns, self._slots.layout)

    def _run(
        self, code: Mapping[str, CompiledBlock], shapes: Shapes, tokens: Sequence[int]
    ) -> Tensor:
        return self._blocks.run(code, partial(self._windowed, shapes, tokens))

    def _windowed(self, shapes: Shapes, tokens: Sequence[int]) -> Tensor:
        """A step of the twin, which calls blocks as it is told to."""
        more = [0] * (shapes.rows - len(tokens))
        with self._slots.used(0, shapes.rows):
            return self._twin.step([*tokens, *more], self._states, window=shapes.window)

    def _toward(self, shapes: Shapes, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """An eager step, by which the code for its shapes comes nearer."""
        self._collect()
        if shapes in self._unproven:
            return self._proven(shapes, tokens, used)
        if self._building is not None:
            return self._counted(self.making, tokens)
        self._forget_other_layouts(shapes)
        self.counts[self.making] += 1
        logits, calls = self._blocks.recorded(partial(self._windowed, shapes, tokens))
        self._start(shapes, calls)
        return logits

    def _collect(self) -> None:
        """Take what the compiler has made."""
        if self._building is None or self._building[1].is_alive():
            return
        (shapes, _), self._building = self._building, None
        if isinstance(self._built, Exception):
            self._refuse(shapes, self._built)
        elif self._built is not None:
            self._unproven[shapes] = self._built
        self._built = None

    def _forget_other_layouts(self, shapes: Shapes) -> None:
        """Drop code whose A and B are no longer those of the slots."""
        for kept in (self._code, self._unproven, self._refused):
            for other in [each for each in kept if each.layout != shapes.layout]:
                del kept[other]

    def _start(self, shapes: Shapes, calls: Mapping[str, Recorded]) -> None:
        frame = self._slots.standing(0, shapes.rows)
        # Chosen here: another thread may compute with another number of threads.
        linears = few_rows(self._decoder.model, shapes.rows)
        self._built = None
        thread = threading.Thread(
            target=self._build,
            args=(frame, calls, linears),
            name="lorakit-compiler",
            daemon=True,
        )
        self._building = shapes, thread
        thread.start()

    def _build(
        self, frame: Frame, calls: Mapping[str, Recorded], linears: AbstractContextManager[Any]
    ) -> None:
        """Compile the blocks of a step: what the thread does."""
        route = attachment_for(self._decoder.model).route
        compiler = BlockCompiler(route, frame, self._compile, linears)
        code: dict[str, CompiledBlock] = {}
        try:
            with short_turns():
                for path, recorded in calls.items():
                    if self._stop.is_set():
                        return
                    code[path] = compiler.compiled(recorded)
            self._built = code
        except Exception as error:
            self._built = error

    def _proven(self, shapes: Shapes, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """A step both ways; the code is used from now on if they are equal to rounding.

        Raises:
            ModelError: they are not.
        """
        code = self._unproven.pop(shapes)
        expected = self._compared(self._run(code, shapes, tokens), tokens, used)
        self._code[shapes] = code
        return expected

    @torch.no_grad()
    def warm_up(self) -> None:
        """Wait for the code of steps over rows that are short, however many."""
        cache = DynamicCache()
        with self._slots.used(0, 1):
            self._decoder.read([0], cache)
        self._states.admit(0, cache)
        rows = 1
        while rows < 2 * self._slots.count:
            used = range(min(rows, self._slots.count))
            self.step([0] * len(used), used)
            if self._building is not None:
                self._building[1].join()
            self.step([0] * len(used), used)
            rows *= 2
        self._states.free(0)

    def close(self) -> None:
        """Have the compiler end."""
        self._stop.set()


@contextmanager
def short_turns() -> Iterator[None]:
    """Let other threads have the interpreter soon, inside a block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)

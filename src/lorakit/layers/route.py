"""The route of a model: a stack of frozen frames, of which the layers read the top.

The active operations are those of the top frame: the last one that the running thread pushed for
itself, while the frame under it is in use, and else the last one that was pushed for all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import RouteError
from lorakit.layers.operation import Operations
from lorakit.layers.token_positions import TokenPositions
from lorakit.upstream.private_names import in_backward

Combination = tuple[tuple[str, float], ...]
"""What one row uses: the names of adapters, sorted, each with its weight; empty: the base."""


@dataclass(frozen=True, eq=False)
class Frame:
    """The active operations and all that belongs to them; the default is the base alone."""

    operations: Operations | None = None
    """The active operations; None: the base alone."""
    name: str | None = None
    """The adapter of every row; None: the base, or rows differ."""
    rows: int | None = None
    """The number of rows that a batch must have; None: any."""
    choices: tuple[Combination, ...] | None = None
    """What each row uses, or all of them (one entry); None: what `name` says."""
    merged: bool = False
    """Whether the base's weights hold the adapter, so that no operation is needed."""
    key: object = None
    """Identifies the operations without holding their memory: equal for equal operations."""
    tokens: TokenPositions | None = None
    """Where virtual tokens are in the rows of a model's call."""
    under: Frame | None = None
    """In a thread's own frame, the frame of all threads that was the top when a model was called:
    the operations hold while it still is. None: they hold whatever the other frames are."""

    @staticmethod
    def of(operations: Operations, name: str | None = None) -> Frame:
        """The frame of operations that no frame had before."""
        return Frame(operations, name, key=object())


@dataclass(frozen=True)
class Batch:
    """The batch of a model's call, as far as routes ask for it."""

    rows: int
    """Those of the route, or several times as many in `generate`."""
    has_sequences: bool
    """Whether a row has several tokens."""


class OwnFrames(threading.local):
    """The frames that each thread pushed for itself."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []
        self.calls: list[int] = []
        """The numbers of layers, with parameters that others read, whose calls run."""

    @contextmanager
    def pushed(self, frame: Frame) -> Iterator[None]:
        """Have a frame on top in this thread, inside a block."""
        self.stack.append(frame)
        try:
            yield
        finally:
            self.stack.pop()


@dataclass(eq=False)
class Route:
    """The stack of frames of one model; all its adapted layers share it.

    `switch` replaces the bottom frame, and a merge does. `with` blocks push a frame for all
    threads. For its own thread alone, a call of a model with virtual tokens pushes one, and so does
    a block of the model that a backward pass recomputes.
    """

    frame: Frame = field(default_factory=Frame)
    """The top of the frames of all threads: one assignment changes what every layer does."""
    layers: int = 0
    """How many layers were converted so far; the next one gets this number."""
    below: tuple[Frame, ...] = ()
    """The frames under it, the bottom first: there are as many as open `with` blocks."""
    own: OwnFrames = field(default_factory=OwnFrames)
    latest: object = None
    """The key of the frame of the latest forward pass that was made for training."""
    repeats: int = 1
    """How many rows `generate` makes of each at present: beams, or several answers."""
    batch: Batch | None = None
    """The batch of the model's latest call under a route whose rows may differ."""
    unsure: set[int] = field(default_factory=set)
    """The layers in this call whose input may have tokens where rows are expected."""
    waiting: set[int] = field(default_factory=set)
    """The layers that this call has not come to; kept only where somebody looks at it."""
    lock: AbstractContextManager[Any] = field(default_factory=threading.RLock)
    """Held for moments, where frames change, or what an adapter's frame is."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle is outside of all blocks and calls.
        return Route, (self.bottom, self.layers)

    @property
    def top(self) -> Frame:
        """The frame whose operations are active."""
        # Compiled code would keep what it read of one thread for all.
        if not torch.compiler.is_compiling() and self.own.stack:
            own = self.own.stack[-1]
            if own.under is None or own.under is self.frame:
                return own
        return self.frame

    @property
    def bottom(self) -> Frame:
        """The frame outside of all `with` blocks."""
        return self.below[0] if self.below else self.frame

    @property
    def merged(self) -> str | None:
        """The adapter that the base's weights hold at present."""
        return self.bottom.name if self.bottom.merged else None

    def set_bottom(self, frame: Frame) -> None:
        """Replace the bottom frame; `with` blocks that are open stay as they are."""
        with self.lock:
            if self.below:
                self.below = (frame, *self.below[1:])
            else:
                self.frame = frame

    def switch(self, frame: Frame) -> None:
        """Replace the top frame: outside of `with` blocks the bottom, inside until its end."""
        with self.lock:
            self.frame = replace(frame, rows=self.frame.rows) if self.below else frame

    @contextmanager
    def block(self, frame: Frame) -> Iterator[None]:
        """Have a frame on top for all threads, inside a `with` block."""
        with self.lock:
            self.below = (*self.below, self.frame)
            self.frame = frame
        try:
            yield
        finally:
            with self.lock:
                self.frame = self.below[-1]
                self.below = self.below[:-1]
                self.repeats, self.batch = 1, None

    def of_call(self, tokens: TokenPositions | None) -> Frame:
        """The frame of a call of the model whose rows have virtual tokens at these positions."""
        top = self.top
        return replace(top, tokens=tokens, under=self.frame if top is self.frame else top.under)

    @contextmanager
    def for_rows(self, rows: Tensor) -> Iterator[None]:
        """Let the positions of virtual tokens be those of some rows, inside a block."""
        stack = () if torch.compiler.is_compiling() else self.own.stack
        if not stack or stack[-1].tokens is None:
            yield
            return
        with self.own.pushed(replace(stack[-1], tokens=stack[-1].tokens.of_rows(rows))):
            yield

    def check_recomputation(self) -> None:
        """Note the route of a forward pass, and compare it where a backward pass recomputes one.

        Raises:
            RouteError: activations are recomputed (gradient checkpointing) under another route
                than that of the forward pass, which would give the gradients of another model.
        """
        top = self.top
        if not in_backward():
            self.latest = top.key
        elif self.latest is not top.key and (top is self.frame or top.under is not None):
            raise RouteError(
                "the backward pass recomputes activations (gradient checkpointing), but the route "
                "of the forward pass is over: call backward() inside its `with` block"
            )

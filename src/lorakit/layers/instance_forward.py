"""A forward pass that somebody else put on a layer's object, and the adapter with it.

accelerate does so to move inputs and weights, and so does anyone who patches `layer.forward`. The
object's own attribute comes before the method of the adapted class, which would never be called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn


class Reached(threading.local):
    """Whether the running call has come to the adapted layer's own method."""

    now = False


class InstanceForward:
    """The forward pass of a layer's object, after which the adapter acts if it has not within.

    What somebody put there after `attach` calls the adapted layer's method as a rule; what was
    there before, or computes everything by itself, does not.
    """

    def __init__(
        self,
        layer: nn.Module,
        own: Callable[..., Any],
        adapt: Callable[..., Any],
    ) -> None:
        """Take the place of a forward pass.

        Args:
            layer: the adapted layer.
            own: what somebody put on it.
            adapt: from the layer, an output, and the arguments of a call to the adapted output.
        """
        self.layer = layer
        self.own = own
        self.adapt = adapt
        self._reached = Reached()

    def note(self) -> None:
        """Take note that the running call has come to the adapted layer's own method."""
        self._reached.now = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output with the adapter's update."""
        outer, self._reached.now = self._reached.now, False
        try:
            with getattr(self.layer, "own_call", nullcontext)():
                output = self.own(*args, **kwargs)
            reached = self._reached.now
        finally:
            self._reached.now = outer
        latest = getattr(self.layer, "adapter_patch", None)
        if latest not in (None, self):
            # Somebody put another one around this: the adapter acts once.
            latest.note()
        return output if reached else self.adapt(self.layer, output, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Threads' notes are of calls that run now.
        return InstanceForward, (self.layer, self.own, self.adapt)

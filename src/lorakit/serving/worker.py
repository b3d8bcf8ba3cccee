"""A thread that owns a model and answers what comes through a bounded queue."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from lorakit.models.shape import context_length
from lorakit.routing.slot_content import Terms
from lorakit.serving.admission import ClosedError, Queue
from lorakit.serving.prefixes import Prefixes
from lorakit.serving.requests import Delta, Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much an engine does at once."""

    slots: int = 16
    """The most requests that are answered at once."""
    slot_rank: int = 64
    """The largest rank for which each slot has room; what has more is computed by itself."""
    max_length: int | None = None
    """The most tokens of prompt and answer; None: the model's context."""
    prefill_tokens: int = 512
    """The most tokens of prompts that are read between two steps of the answers, with padding."""
    prefix_bytes: int = 256_000_000
    """The most memory of keys and values that are kept, for prompts that begin alike."""
    waiting_requests: int = 256
    """The most requests that wait for a slot."""
    waiting_tokens: int = 1_000_000
    """The most tokens of their prompts and answers."""
    compile: Literal["auto", "off", "wait"] = "off"
    """Whether decode steps are compiled: beside the eager ones, never, or before `warm_up` ends."""
    batch_invariant: bool = False
    """Whether answers do not depend on the batch, to the bit."""


class Worker:
    """What decoders' and encoders' engines have in common: the queue, the thread, and its end.

    Args:
        model: nobody else may call it while the thread runs.
        limits: how much is done at once.
    """

    encodes: ClassVar[bool] = False
    """Whether it gives embeddings and classes; else it writes text."""

    def __init__(self, model: PreTrainedModel, limits: Limits | None) -> None:
        self.limits = limits or Limits()
        self.model = model.eval()
        lengths = (context_length(model), self.limits.max_length, 2**31)
        self.max_length = min(length for length in lengths if length is not None)
        """The most tokens of prompt and answer."""
        self.prefixes = Prefixes(self.limits.prefix_bytes)
        self.queue = Queue(self.limits.waiting_requests, self.limits.waiting_tokens)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lorakit-engine", daemon=True)

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model's embedding has."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0]

    def warm_up(self, terms: Iterable[Terms] = ()) -> None:
        """Get ready before the start.

        Args:
            terms: what rows will use, as far as it is known.
        """

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Have requests answered, all or none; each is told by its `deliver`.

        Raises:
            QueueFullError: there is no room for them.
            ClosedError: the engine is about to end.
        """
        with self._wake:
            if self._closing:
                raise ClosedError("the server is about to end: ask another, or again later")
            self.queue.put(requests)
            self._wake.notify()

    def wake(self) -> None:
        """Have the engine look for requests that were cancelled."""
        with self._wake:
            self._wake.notify()

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end once those that came are answered, or at once.

        Returns:
            Whether the engine has ended.
        """
        with self._wake:
            self._closing = True
            if not drain:
                for request in (*self.queue.waiting(), *self.running()):
                    request.cancel()
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def running(self) -> list[Request]:
        """The requests that have a slot."""
        raise NotImplementedError

    @property
    def step_counts(self) -> Counter[str]:
        """The decode steps so far: compiled, or the reason why they were eager."""
        return Counter()

    @property
    def used_share(self) -> float:
        """The share of the tokens that slots may hold."""
        return 0.0

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._wake:
                    while not (self.running() or len(self.queue)):
                        if self._closing:
                            return
                        self._wake.wait()
                try:
                    self._step()
                except Exception as error:
                    self._fail(error)

    def _step(self) -> None:
        """Do a part of what there is to do."""
        raise NotImplementedError

    def _fail(self, error: Exception) -> None:
        """Tell all requests that have a slot what went wrong."""
        raise NotImplementedError

    def _drop_cancelled(self) -> None:
        """Tell those that wait no longer."""
        gone = [each for each in self.queue.waiting() if each.cancelled.is_set()]
        if gone:
            self.queue.remove(gone)
            for request in gone:
                deliver(request, Delta(finish="cancelled"))


def deliver(request: Request, delta: Delta) -> bool:
    """Tell a request; False: nobody hears it any more."""
    tell: Callable[[Delta], None] = request.deliver
    try:
        tell(delta)
    except Exception:
        # The loop of the one who asked may have ended, which is no reason for others to wait.
        return False
    return True

"""A piece of work that pauses to ask for something: a thread that takes turns with its owner."""

from __future__ import annotations

import random
from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Any, Generic, TypeVar

import numpy as np
import torch

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Made = TypeVar("Made")


class CoroutineThread(Generic[Asked, Answer, Made]):
    """Work that runs only while `advance` waits for it, and has its own random numbers.

    So of a strand and its owner, and of all strands of one owner, exactly one runs at a time:
    nothing they share needs a lock, and what happens does not depend on timing. transformers'
    Trainer calls our code and not the other way round, so a generator would not do.
    """

    def __init__(self, name: str, work: Callable[[Callable[[Asked], Answer]], Made]) -> None:
        """Prepare the work, which gets a function that asks the owner and returns the answer."""
        self._work = work
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._may_run, self._has_paused = Semaphore(0), Semaphore(0)
        self._random = random_state()
        self._asked: Asked | None = None
        self._answer: Answer | None = None
        self._closing = False
        self.made: Made | None = None
        """What the work returned."""
        self.error: BaseException | None = None
        """What the work raised."""

    def advance(self, answer: Answer | None = None) -> Asked | None:
        """Run until the work asks for something, and return that; None when it has ended.

        Args:
            answer: what the work asked for the last time.
        """
        outside = random_state()
        set_random_state(self._random)
        self._answer = answer
        try:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._may_run.release()
            self._has_paused.acquire()
        finally:
            self._random = random_state()
            set_random_state(outside)
        return self._asked

    def close(self) -> None:
        """End work that has not ended, at the place where it asks."""
        if self._thread.is_alive():
            self._closing = True
            self._may_run.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            self.made = self._work(self._ask)
        # The owner decides what an error means, Ctrl-C and the end of the program included.
        except BaseException as error:
            self.error = error
        self._asked = None
        self._has_paused.release()

    def _ask(self, asked: Asked) -> Answer:
        self._asked = asked
        self._has_paused.release()
        self._may_run.acquire()
        if self._closing:
            raise SystemExit
        return self._answer  # type: ignore[return-value]


def random_state() -> tuple[Any, ...]:
    """The state of the random generators of Python, NumPy and torch."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Go back to a state that `random_state` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)

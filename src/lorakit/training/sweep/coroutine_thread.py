"""A coroutine in a thread: work that submits a request, and pauses until its owner replies.

transformers' Trainer calls our code and not the other way round, so a generator cannot pause it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Any, Generic, TypeVar

import numpy as np
import torch

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Result = TypeVar("Result")


class CoroutineThread(Generic[Request, Reply, Result]):
    """Work that runs only while `advance` waits for it, and has its own random numbers.

    Of an owner and all its coroutine threads, exactly one runs at a time: what they share needs no
    lock, and results do not depend on timing.
    """

    def __init__(self, name: str, work: Callable[[Callable[[Request], Reply]], Result]) -> None:
        """Prepare the thread.

        Args:
            name: the thread's name.
            work: what it runs. Its argument is a function that submits a request to the owner and
                returns the reply.
        """
        self._work = work
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._may_run, self._has_paused = Semaphore(0), Semaphore(0)
        self._random = random_state()
        self._request: Request | None = None
        self._reply: Reply | None = None
        self._closing = False
        self.result: Result | None = None
        """What the work returned."""
        self.error: BaseException | None = None
        """What the work raised."""

    def advance(self, reply: Reply | None = None) -> Request | None:
        """Run until the work submits a request, and return that; None when it has ended.

        Args:
            reply: the reply to its last request.
        """
        outside = random_state()
        set_random_state(self._random)
        self._reply = reply
        try:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._may_run.release()
            self._has_paused.acquire()
        finally:
            self._random = random_state()
            set_random_state(outside)
        return self._request

    def close(self) -> None:
        """End work that has not ended: its pending request raises SystemExit."""
        if self._thread.is_alive():
            self._closing = True
            self._may_run.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            self.result = self._work(self._submit)
        # The owner decides what an error means, Ctrl-C and the end of the program included.
        except BaseException as error:
            self.error = error
        self._request = None
        self._has_paused.release()

    def _submit(self, request: Request) -> Reply:
        self._request = request
        self._has_paused.release()
        self._may_run.acquire()
        if self._closing:
            raise SystemExit
        return self._reply  # type: ignore[return-value]


def random_state() -> tuple[Any, ...]:
    """The state of the random number generators of Python, NumPy and torch."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore a state that `random_state` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)

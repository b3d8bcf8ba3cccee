"""The queue before the engine: bounded, and fair between keys and between adapters."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from lorakit.errors import LorakitError
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Request

MEASURED = 32
"""How many of the latest intervals between two requests that left the queue are averaged."""
LONGEST_WAIT_S = 120


class QueueFullError(LorakitError):
    """The server has more to do than it may let wait.

    Args:
        message: how much that is.
        retry_after_s: when there is room, as far as the latest requests tell.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClosedError(LorakitError):
    """The server is about to end, and takes no new requests."""


class Queue:
    """Requests that wait: the clients take turns, and of each client the adapters.

    Args:
        most_requests: the most that may wait.
        most_tokens: the most tokens of prompts and answers that may wait.
        clock: the time in seconds.
    """

    def __init__(
        self,
        most_requests: int,
        most_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_requests, self._most_tokens = most_requests, most_tokens
        self._waiting: OrderedDict[str, OrderedDict[str, deque[Request]]] = OrderedDict()
        """By client, and by what answers them."""
        self._lock = threading.RLock()
        self._count, self._tokens = 0, 0
        self._promised = 0
        """The places of requests that are being prepared."""
        self._clock = clock
        self._since = 0.0
        """Since when somebody waits without one leaving."""
        self._intervals: deque[float] = deque(maxlen=MEASURED)

    def __len__(self) -> int:
        return self._count

    def put(self, requests: Collection[Request]) -> None:
        """Let requests wait, all of them or none.

        Raises:
            QueueFullError: there is no room for them.
        """
        tokens = sum(map(_tokens, requests))
        with self._lock:
            self.check_room(len(requests))
            # One that is alone may be as long as it likes: else it could never be answered.
            over = self._tokens + tokens - self._most_tokens
            if self._count and over > 0:
                raise QueueFullError(
                    f"requests of {self._tokens:,} tokens are waiting, and no more than "
                    f"{self._most_tokens:,} may: ask again later",
                    self._until_gone(math.ceil(over * self._count / self._tokens)),
                )
            if not self._count:
                self._since = self._clock()
            for request in requests:
                of_client = self._waiting.setdefault(request.client, OrderedDict())
                of_client.setdefault(request.use.key, deque()).append(request)
            self._count += len(requests)
            self._tokens += tokens

    def check_room(self, requests: int = 1) -> None:
        """Refuse what could not wait, before anybody prepares it.

        Raises:
            QueueFullError: there is no room for so many.
        """
        with self._lock:
            waiting = self._count + self._promised
            beyond = waiting + requests - self._most_requests
            if beyond > 0:
                raise QueueFullError(
                    f"{waiting:,} requests are waiting, and no more than "
                    f"{self._most_requests:,} may: ask again later",
                    self._until_gone(beyond),
                )

    @contextmanager
    def reserved(self, requests: int) -> Iterator[None]:
        """Keep places while requests are prepared, inside a block, so that it is not in vain.

        Raises:
            RefusalError: so many could not wait even if nobody else did.
            QueueFullError: there is no room for so many now.
        """
        if requests > self._most_requests:
            raise RefusalError(
                f"prompts times n are {requests:,} answers, and no more than "
                f"{self._most_requests:,} requests may wait (the server's waiting_requests): ask "
                "for fewer at once"
            )
        with self._lock:
            self.check_room(requests)
            self._promised += requests
        try:
            yield
        finally:
            with self._lock:
                self._promised -= requests

    def _until_gone(self, count: int) -> int:
        """The seconds until so many requests have left the queue."""
        measured = list(self._intervals)
        if self._count:
            # The present one may be the longest of all.
            measured.append(self._clock() - self._since)
        expected = count * sum(measured) / max(1, len(measured))
        return max(1, min(LONGEST_WAIT_S, math.ceil(expected)))

    def take(self) -> Request | None:
        """The next one: the oldest of the client and the adapter whose turns it is; None: nobody
        waits."""
        with self._lock:
            if not self._waiting:
                return None
            client, of_client = self._waiting.popitem(last=False)
            key, own = of_client.popitem(last=False)
            request = own.popleft()
            if own:
                of_client[key] = own
            if of_client:
                self._waiting[client] = of_client
            self._count -= 1
            self._tokens -= _tokens(request)
            now = self._clock()
            self._intervals.append(now - self._since)
            self._since = now
            return request

    def remove(self, requests: Collection[Request]) -> None:
        """Forget requests that nobody wants answered any more."""
        gone = set(map(id, requests))
        with self._lock:
            for client, of_client in list(self._waiting.items()):
                for key, own in list(of_client.items()):
                    left = [each for each in own if id(each) in gone]
                    self._count -= len(left)
                    self._tokens -= sum(map(_tokens, left))
                    of_client[key] = deque(each for each in own if id(each) not in gone)
                    if not of_client[key]:
                        del of_client[key]
                if not of_client:
                    del self._waiting[client]

    def waiting(self) -> list[Request]:
        """Those that wait, in no particular order."""
        with self._lock:
            return list(self._each())

    def _each(self) -> Iterator[Request]:
        for of_client in self._waiting.values():
            for own in of_client.values():
                yield from own


def _tokens(request: Request) -> int:
    return len(request.prompt) + request.max_tokens

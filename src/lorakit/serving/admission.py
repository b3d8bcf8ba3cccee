"""The queue before the engine: bounded, and fair between adapters."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator

from lorakit.errors import LorakitError
from lorakit.serving.requests import Request


class QueueFullError(LorakitError):
    """The server has more to do than it may let wait; ask again later."""


class ClosedError(LorakitError):
    """The server is about to end, and takes no new requests."""


class Queue:
    """Requests that wait, by what answers them: the adapters take turns.

    Args:
        most_requests: the most that may wait.
        most_tokens: the most tokens of prompts and answers that may wait.
    """

    def __init__(self, most_requests: int, most_tokens: int) -> None:
        self._most_requests, self._most_tokens = most_requests, most_tokens
        self._waiting: OrderedDict[str, deque[Request]] = OrderedDict()
        self._lock = threading.Lock()
        self._count, self._tokens = 0, 0

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
            if self._count and self._tokens + tokens > self._most_tokens:
                raise QueueFullError(
                    f"requests of {self._tokens:,} tokens are waiting, and no more than "
                    f"{self._most_tokens:,} may: ask again later"
                )
            for request in requests:
                self._waiting.setdefault(request.use.key, deque()).append(request)
            self._count += len(requests)
            self._tokens += tokens

    def check_room(self, requests: int = 1) -> None:
        """Refuse what could not wait, before anybody prepares it.

        Raises:
            QueueFullError: there is no room for so many.
        """
        if self._count + requests > self._most_requests:
            raise QueueFullError(
                f"{self._count:,} requests are waiting, and no more than "
                f"{self._most_requests:,} may: ask again later"
            )

    def take(self) -> Request | None:
        """The next one: the oldest of the adapter whose turn it is; None: nobody waits."""
        with self._lock:
            if not self._waiting:
                return None
            key, own = self._waiting.popitem(last=False)
            request = own.popleft()
            if own:
                self._waiting[key] = own
            self._count -= 1
            self._tokens -= _tokens(request)
            return request

    def remove(self, requests: Collection[Request]) -> None:
        """Forget requests that nobody wants answered any more."""
        gone = set(map(id, requests))
        with self._lock:
            for key, own in list(self._waiting.items()):
                kept = deque(each for each in own if id(each) not in gone)
                left = [each for each in own if id(each) in gone]
                self._count -= len(left)
                self._tokens -= sum(map(_tokens, left))
                if kept:
                    self._waiting[key] = kept
                else:
                    del self._waiting[key]

    def waiting(self) -> list[Request]:
        """Those that wait, in no particular order."""
        with self._lock:
            return list(self._each())

    def _each(self) -> Iterator[Request]:
        for own in self._waiting.values():
            yield from own


def _tokens(request: Request) -> int:
    return len(request.prompt) + request.max_tokens

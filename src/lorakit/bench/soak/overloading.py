"""What a server does that is asked more than it can answer."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lorakit.bench.result import Goal
from lorakit.bench.serving.asking import Client, CompletionRequest, Reply

TIMES = 5
"""How many times what it can answer is asked."""
MOST_AT_ONCE = 512


@dataclass(frozen=True)
class Capacity:
    """What a server answers when it is asked without pause by as many clients as it has slots."""

    requests_s: float
    tokens_s: float


def capacity(
    client: Client, pool: Sequence[CompletionRequest], *, connections: int, seconds: float
) -> Capacity:
    """The answers of a second, without overload."""
    end = time.perf_counter() + seconds
    begun = time.perf_counter()
    with ThreadPoolExecutor(connections) as threads:

        def ask(number: int) -> int:
            count = 0
            while time.perf_counter() < end:
                client.complete(pool[(number + count * connections) % len(pool)])
                count += 1
            return count

        done = sum(threads.map(ask, range(connections)))
    took = time.perf_counter() - begun
    tokens = statistics.fmean(each.new_tokens for each in pool)
    return Capacity(done / took, done * tokens / took)


def overloading(
    client: Client, pool: Sequence[CompletionRequest], able: Capacity, *, seconds: float
) -> tuple[list[Goal], list[dict[str, Any]]]:
    """Ask so many times what the server can answer.

    Args:
        client: of the server.
        pool: what is asked, in turn.
        able: what the server can answer.
        seconds: how long.

    Returns:
        The goals, and a row of each kind of answer.
    """
    gap = 1 / (TIMES * able.requests_s)
    waiting: list[tuple[CompletionRequest, Future[Reply]]] = []
    begun = time.perf_counter()
    with ThreadPoolExecutor(MOST_AT_ONCE) as threads:
        number = 0
        while (now := time.perf_counter() - begun) < seconds:
            if now < number * gap:
                time.sleep(number * gap - now)
            asked = pool[number % len(pool)]
            waiting.append((asked, threads.submit(client.complete, asked)))
            number += 1
        answered = [(asked, future.result()) for asked, future in waiting]
    took = time.perf_counter() - begun
    tokens = sum(asked.new_tokens for asked, answer in answered if answer.is_good)
    refused = [answer for _, answer in answered if answer.status == 429]
    late = sorted(answer.seconds for answer in refused)
    failed = sum(answer.status >= 500 for _, answer in answered)
    without = sum("retry-after" not in answer.headers for answer in refused)
    under = f"{TIMES} times too many requests"
    return [
        Goal(
            what=f"answered tokens under {under}, over those without",
            got=tokens / took / able.tokens_s,
            limit=0.95,
            at_least=True,
        ),
        Goal(
            what=f"time of a 429 (of {len(refused):,}), 99th percentile",
            got=1000 * late[int(0.99 * (len(late) - 1))] if late else float("inf"),
            limit=50.0,
            unit="ms",
        ),
        Goal.never(f"429 without Retry-After under {under}", without),
        Goal.never(f"5xx under {under}", failed),
    ], _kinds([answer for _, answer in answered])


def _kinds(answers: Sequence[Reply]) -> list[dict[str, Any]]:
    """How many answers there are of each status, with the words of one of them."""
    kinds = Counter(answer.status for answer in answers)
    first = {answer.status: answer for answer in reversed(answers)}
    return [
        {"status": status, "answers": count, "told": _words(first[status])}
        for status, count in sorted(kinds.items())
    ]


def _words(answer: Reply) -> str:
    return "" if answer.is_good else str(answer.body["error"]["message"])

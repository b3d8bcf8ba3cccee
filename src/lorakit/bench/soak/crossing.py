"""Whether each answer is that of the weights it names, while adapters come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lorakit.bench.result import Goal
from lorakit.bench.serving.asking import Client, CompletionRequest, Reply
from lorakit.bench.serving.process import ServerProcess
from lorakit.errors import LorakitError

COME_AND_GO_S = 0.05
"""Between a load and an unload."""
BFLOAT16_PERCENT = 99.5
"""Answers that are those alone, at least, where a sum may be rounded otherwise among others."""
FIRST_SHARE = 10
"""The memory after one request in so many is compared with that after all."""


@dataclass(frozen=True)
class Crossing:
    """Answers beside those to the same requests alone."""

    crossed: int
    """Answers of other weights than the request names, by their fingerprints."""
    failed: int
    different: int
    """Answers with other tokens than the request got alone."""
    count: int
    loads: int
    """Loads and unloads meanwhile."""
    growth: float | None
    """The server's memory after all requests over that after a tenth; None where not known."""

    def goals(self, *, exact: bool) -> list[Goal]:
        """Whether that is as it should be.

        Args:
            exact: the base is in float32, where no answer may differ from the one alone.
        """
        same = 100 * (1 - self.different / self.count)
        found = [
            Goal.never(f"crossed of {self.count:,} answers", self.crossed),
            Goal.never(f"failed of {self.count:,} answers", self.failed),
            Goal(
                what="seeded answers at temperature 1 among others that equal those alone",
                got=same,
                limit=100.0 if exact else BFLOAT16_PERCENT,
                unit="%",
                at_least=True,
            ),
        ]
        if self.growth is not None:
            what = "memory after all requests over that after a tenth"
            found.append(Goal(what=what, got=self.growth, limit=1.02))
        return found


def crossing(
    server: ServerProcess,
    pool: Sequence[CompletionRequest],
    spares: Sequence[str],
    *,
    requests: int,
    connections: int,
) -> Crossing:
    """Ask a pool of requests again and again, with many at once.

    Args:
        server: has loaded the adapters that the pool names.
        pool: different requests.
        spares: folders of adapters that are loaded and unloaded meanwhile.
        requests: how many are asked.
        connections: at once.

    Raises:
        LorakitError: a request gets no answer when it is asked alone.
    """
    client = server.client
    alone = [client.complete(asked) for asked in pool]
    for answer in alone:
        if not answer.is_good:
            raise LorakitError(f"a request alone was answered with {answer.status}: {answer.body}")
    numbers = [number % len(pool) for number in range(requests)]
    first = max(requests // FIRST_SHARE, 1)
    with _coming_and_going(client, spares) as loads:
        answers = client.complete_all([pool[n] for n in numbers[:first]], connections)
        before = server.resident_bytes()
        answers += client.complete_all([pool[n] for n in numbers[first:]], connections)
        after = server.resident_bytes()
    good = [
        (answer, alone[number])
        for answer, number in zip(answers, numbers, strict=True)
        if answer.is_good
    ]
    return Crossing(
        crossed=sum(own.fingerprint != one.fingerprint for own, one in good),
        failed=requests - len(good),
        different=sum(own.tokens != one.tokens for own, one in good),
        count=requests,
        loads=len(loads),
        growth=None if before is None or after is None else after / before,
    )


def seeded(
    client: Client,
    asked: CompletionRequest,
    names: Sequence[str],
    *,
    seeds: int,
    connections: int,
    exact: bool,
) -> Goal:
    """Whether requests with seeds get the same tokens alone and among others.

    Args:
        client: of the server.
        asked: what is asked, drawn at temperature 1.
        names: adapters, which are asked in turn.
        seeds: how many requests, each with its own seed.
        connections: how many of them are asked at once.
        exact: the base is in float32, where no answer may differ from the one alone.
    """
    requests = [replace(asked, model=names[seed % len(names)], seed=seed) for seed in range(seeds)]
    alone = [client.complete(request) for request in requests]
    among = client.complete_all(requests, connections)
    same = sum(
        own.is_good and one.is_good and own.tokens == one.tokens
        for own, one in zip(among, alone, strict=True)
    )
    return Goal(
        what=f"identical alone and among {connections - 1} others, of {seeds} seeds",
        got=float(same),
        limit=float(seeds) if exact else seeds * BFLOAT16_PERCENT / 100,
        unit="",
        at_least=True,
    )


@contextmanager
def _coming_and_going(client: Client, spares: Sequence[str]) -> Iterator[list[Reply]]:
    """Adapters that are loaded and unloaded in turn inside a block; the server's answers."""
    ended = threading.Event()
    told: list[Reply] = []

    def change() -> None:
        while True:
            for spare in spares:
                body = {"lora_name": f"spare-{spare}", "lora_path": spare}
                told.append(client.post("/v1/load_lora_adapter", body))
                if ended.wait(COME_AND_GO_S):
                    return
                told.append(client.post("/v1/unload_lora_adapter", body))
                if ended.wait(COME_AND_GO_S):
                    return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()

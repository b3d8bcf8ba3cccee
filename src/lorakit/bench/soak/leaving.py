"""Whether clients that leave, read nothing or say half of it cost the others anything."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Thread

from lorakit.bench.result import Goal
from lorakit.bench.serving.asking import Client, CompletionRequest, Reply
from lorakit.errors import LorakitError

RUNNING = "vllm:num_requests_running"
LONG = 4
"""Streams that are left or not read have so many times the tokens of others."""
LOOK_S = 0.005


def leaving(client: Client, asked: CompletionRequest, *, times: int) -> list[Goal]:
    """Close streams after their first event.

    Args:
        client: of the server.
        asked: what is asked, with an answer long enough to be left in its middle.
        times: how often.
    """
    long = replace(asked, new_tokens=LONG * asked.new_tokens)
    step_s = client.complete(long).seconds / long.new_tokens
    waits = []
    for number in range(times):
        with client.streaming(replace(long, seed=number)) as response:
            response.readline()
        begun = time.perf_counter()
        while client.metric(RUNNING):
            time.sleep(LOOK_S)
        waits.append(time.perf_counter() - begun)
    slowest = sorted(waits)[int(0.99 * (len(waits) - 1))]
    what = f"steps until a slot is free, 99th percentile of {times:,} closed streams"
    return [
        Goal(what=what, got=slowest / step_s, limit=2.0, unit="steps"),
        Goal.never(f"slots in use after {times:,} closed streams", int(client.metric(RUNNING))),
    ]


def holding_up(client: Client, asked: CompletionRequest, *, others: int, probes: int) -> list[Goal]:
    """The time of answers beside clients that read nothing, over that beside ones that read.

    Args:
        client: of the server.
        asked: what is asked.
        others: streams beside; as many half-sent bodies and idle sockets.
        probes: answers that are timed.
    """
    long = [
        replace(asked, new_tokens=LONG * asked.new_tokens * probes, seed=each)
        for each in range(others)
    ]
    with _reading(client, long):
        usual = _times(client, asked, probes)
    with ExitStack() as stack:
        for each in long:
            stack.enter_context(client.streaming(each))
            stack.enter_context(_half_sent(client.port))
            stack.enter_context(socket.create_connection(("127.0.0.1", client.port)))
        held = _times(client, asked, probes)
    what = f"answer beside {others} slow readers, half-sent bodies and idle sockets, over readers"
    return [Goal(what=what, got=statistics.median(held) / statistics.median(usual), limit=1.2)]


@contextmanager
def _reading(client: Client, streams: Sequence[CompletionRequest]) -> Iterator[None]:
    """Streams that are read to their end, or to the block's."""
    with ExitStack() as stack:
        for each in streams:
            response = stack.enter_context(client.streaming(each))
            Thread(target=_read, args=(response,), daemon=True).start()
        yield


def _read(response: object) -> None:
    try:
        for _ in response:  # type: ignore[attr-defined]
            pass
    except (OSError, ValueError, AttributeError):
        # The block ended, and with it the connection.
        return


@contextmanager
def _half_sent(port: int) -> Iterator[None]:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        yield


def _times(client: Client, asked: CompletionRequest, probes: int) -> list[float]:
    answers: list[Reply] = [client.complete(asked) for _ in range(probes)]
    for answer in answers:
        if not answer.is_good:
            raise LorakitError(f"an answer beside slow clients is {answer.status}: {answer.body}")
    return [answer.seconds for answer in answers]

"""When tokens come: the first one of an idle server, pauses for long prompts, unlike lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from lorakit.bench.result import OURS, Goal
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.bench.serving.asking import Client, CompletionRequest
from lorakit.bench.serving.ways import generated
from lorakit.config.bench import ServeBenchConfig

BUSY = 0.8
"""The share of the slots that answer while a long prompt comes."""
SHORTEST = 8
"""The fewest tokens of answers of unlike lengths."""
FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
"""The metric that counts answers which have begun."""
WAVES = 3
"""Requests of unlike lengths for each slot."""


def first_token(
    client: Client, plain: Any, asked: CompletionRequest, *, times: int
) -> dict[str, Seconds]:
    """The times to the first token of an idle server, and of the plain model reading the prompt."""
    ids = torch.tensor([asked.prompt])
    short = replace(asked, new_tokens=1)

    @torch.inference_mode()
    def read() -> None:
        plain(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()

    return interleaved(
        {
            OURS: Participant(run=lambda: client.token_times(short)),
            "prefill": Participant(run=read),
        },
        repeats=times,
    )


def first_token_goals(times: dict[str, Seconds]) -> list[Goal]:
    """The median and the slowest of them, over those of the plain model."""
    server, prefill = times[OURS], times["prefill"]
    ends = [_late(each.rounds) for each in (server, prefill)]
    what = "time to first token, idle, over reading the prompt"
    return [
        Goal(what=f"{what}, median", got=server.median / prefill.median, limit=1.15),
        Goal(what=f"{what}, 99th percentile", got=ends[0] / ends[1], limit=1.5),
    ]


def longest_pause(
    client: Client, asked: Sequence[CompletionRequest], settings: ServeBenchConfig
) -> Goal:
    """The longest pause of streams while somebody's long prompt is read, in their usual gaps.

    Args:
        client: of the server.
        asked: a request for each slot; the last one gets the long prompt.
        settings: the length of that prompt and of the streams.
    """
    prompt_tokens = settings.long_prompt
    *others, last = asked[: max(2, round(BUSY * len(asked)))]
    running = [replace(each, new_tokens=settings.longest) for each in others]
    own = replace(last, prompt=(last.prompt * prompt_tokens)[:prompt_tokens], new_tokens=1)

    def stream(request: CompletionRequest) -> list[float]:
        begun = time.perf_counter()
        return [begun + each for each in client.token_times(request)]

    answering = client.metric(FIRST_TOKENS) + len(running)
    with ThreadPoolExecutor(len(running)) as pool:
        streams = [pool.submit(stream, each) for each in running]
        # Until all of them have a token: they pause for each other's prompts, too. A gap may have
        # begun with such a pause, so it counts from the long prompt on.
        while client.metric(FIRST_TOKENS) < answering:
            time.sleep(0.01)
        begun = time.perf_counter()
        client.complete(own)
        ended = time.perf_counter()
        pairs = [pair for each in streams for pair in pairwise(each.result())]
    usual = statistics.median(b - a for a, b in pairs)
    meanwhile = [b - max(a, begun) for a, b in pairs if a < ended and b > begun]
    return Goal(
        what=f"longest pause of {len(running)} streams for a prompt of {prompt_tokens}, in steps",
        got=max(meanwhile, default=usual) / usual,
        limit=3.0,
        unit="steps",
    )


@dataclass(frozen=True)
class Rates:
    """Tokens per second of answers of unlike lengths."""

    capacity: float
    """While others wait for each slot that is free."""
    arriving: float
    """When they arrive at random, so many that they ask for a share BUSY of that."""
    static: float
    """By `generate` for as many rows as there are slots, until the longest of them is done."""


def unlike_lengths(
    client: Client, plain: Any, asked: Sequence[CompletionRequest], settings: ServeBenchConfig
) -> Rates:
    """The rates of answers of 8 tokens to the most, by the server and by static batches."""
    generator = torch.Generator().manual_seed(1)
    slots = settings.clients
    count = WAVES * slots
    drawn = torch.randint(SHORTEST, settings.longest + 1, (count,), generator=generator).tolist()
    requests = [
        replace(asked[number % len(asked)], new_tokens=length)
        for number, length in enumerate(drawn)
    ]
    told = _token_times(client, requests, [0.0] * count)
    firsts = sorted(times[0] for times in told)
    capacity = _rate(requests, told, firsts[slots - 1], firsts[-1])
    each_s = sum(drawn) / count / (BUSY * capacity)
    gaps = torch.empty(count).exponential_(1 / each_s, generator=generator).tolist()
    arrivals = list(accumulate(gaps))
    told = _token_times(client, requests, arrivals)
    arriving = _rate(requests, told, arrivals[count // 4], arrivals[-1])
    ids = torch.tensor([each.prompt for each in asked])
    begun = time.perf_counter()
    for first in range(0, count, len(asked)):
        generated(plain, ids, max(drawn[first : first + len(asked)]))
    static = time.perf_counter() - begun
    return Rates(capacity, arriving, sum(drawn) / static)


def _token_times(
    client: Client, requests: Sequence[CompletionRequest], arrivals: Sequence[float]
) -> list[list[float]]:
    """When each request's events came, in seconds, if they are asked at some times."""
    begun = time.perf_counter()

    def stream(request: CompletionRequest, arrival: float) -> list[float]:
        time.sleep(max(0.0, begun + arrival - time.perf_counter()))
        late = time.perf_counter() - begun
        return [late + each for each in client.token_times(request)]

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(stream, requests, arrivals))


def _rate(
    requests: Sequence[CompletionRequest],
    told: Sequence[Sequence[float]],
    start: float,
    end: float,
) -> float:
    """The tokens of a second between two times."""
    # The last event of a stream has no token, and some tokens have no text, so no event.
    tokens = sum(
        request.new_tokens * sum(start <= time < end for time in times) / len(times)
        for request, times in zip(requests, told, strict=True)
    )
    return tokens / (end - start)


def _late(rounds: Sequence[float]) -> float:
    """The 99th percentile."""
    return sorted(rounds)[int(0.99 * (len(rounds) - 1))]

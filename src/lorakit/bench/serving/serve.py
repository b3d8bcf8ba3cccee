"""`lorakit bench serve`: a server whose clients use different adapters, beside `generate`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakit.bench.peers import save_random_adapters
from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.bench.serving.asking import Client, CompletionRequest
from lorakit.bench.serving.compiled import compiled_engine, compiled_goals, step_times
from lorakit.bench.serving.latency import (
    Rates,
    first_token,
    first_token_goals,
    longest_pause,
    unlike_lengths,
)
from lorakit.bench.serving.others import Other, others
from lorakit.bench.serving.process import running
from lorakit.bench.serving.slot_changes import slot_changes
from lorakit.bench.serving.starting import start_goal, starts
from lorakit.bench.serving.ways import asked, generated, routed
from lorakit.config.bench import ServeBenchConfig
from lorakit.errors import MissingExtraError
from lorakit.models.load import load_model
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits


def measure_serve(settings: ServeBenchConfig) -> Findings:
    """What a server takes for answers, slots and first tokens, and the plain model beside it.

    Raises:
        MissingExtraError: the libraries of the server are not installed.
    """
    _check_library()
    plain, _ = load_model(settings.model, dtype=settings.dtype)
    model, tokenizer = load_model(settings.model, dtype=settings.dtype)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = save_random_adapters(
            model,
            root / "adapters",
            count=settings.adapters,
            rank=settings.rank,
            dtype=settings.adapter_dtype,
        )
        # Each round asks the same again, and is to be measured whole.
        limits = Limits(
            slots=settings.clients, prefill_tokens=settings.prefill_tokens, prefix_bytes=0
        )
        peers, failed = stack.enter_context(others(settings, plain, tokenizer, places, root))
        engine = Engine(model, limits)
        catalog = Catalog(model, tokenizer, "base", folder=root / "adapters")
        catalog.load_all()
        requests = _requests(settings, plain.config.vocab_size, [each.name for each in places])
        changes = slot_changes(settings, engine, catalog, [each.model for each in requests])
        compiling = compiled_engine(settings, engine, catalog)
        steps = step_times(compiling, catalog, requests, repeats=settings.repeats)
        # Servers of their own, as users have them: beside the threads of a second model in one
        # process, neither has the processor as it has it alone.
        client, compiled = (
            stack.enter_context(running(words, threads=settings.threads)).client
            for words in _servers(settings, root / "adapters")
        )
        ways = _ways(settings, client, engine, catalog, plain, requests)
        ways["compiled"] = partial(asked, compiled, requests)
        for name, peer in peers.items():
            ways |= _peer_ways(name, peer, requests)
        seconds = interleaved(
            {name: Participant(run=run) for name, run in ways.items()}, repeats=settings.repeats
        )
        first = first_token(client, plain, requests[0], times=settings.first_tokens)
        pause = longest_pause(client, requests, settings)
        unlike = unlike_lengths(client, plain, requests, settings)
    started = starts(settings)
    rates = {n: settings.clients * settings.new_tokens / s.median for n, s in seconds.items()}
    return Findings(
        timings={"serve": seconds, "first token": first, "start": started},
        goals=(
            *_goals(settings, rates, changes, unlike),
            *compiled_goals(rates, steps),
            *first_token_goals(first),
            pause,
            start_goal(started),
        ),
        tables=_tables(rates, unlike, {**changes, **steps}),
        checks={f"{name} does not run": reason for name, reason in failed.items()},
    )


def _check_library() -> None:
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtraError("the server", "serve") from None


def _tables(
    rates: Mapping[str, float], unlike: Rates, times: Mapping[str, Seconds]
) -> dict[str, list[dict[str, Any]]]:
    """The tokens of a second of each way, and the times of slots and steps."""
    shown = {
        **rates,
        "unlike lengths, at once": unlike.capacity,
        "unlike lengths, arriving": unlike.arriving,
        "unlike lengths, static batches": unlike.static,
    }
    return {
        "tokens": [{"who": name, "tokens/s": rate} for name, rate in shown.items()],
        "slots": [{"what": what, "time_s": each.median} for what, each in times.items()],
    }


def _servers(settings: ServeBenchConfig, adapters: Path) -> list[list[str]]:
    """The words of `lorakit serve` for eager steps, and for compiled ones."""
    how = {
        "model": settings.model,
        "name": "base",
        "adapters": adapters,
        "dtype": settings.dtype,
        "slots": settings.clients,
        "prefill-tokens": settings.prefill_tokens,
        "prefix-bytes": 0,
    }
    words = [part for name, value in how.items() for part in (f"--{name}", str(value))]
    return [[*words, "--compile", compiles] for compiles in ("off", "wait")]


def _requests(
    settings: ServeBenchConfig, vocabulary: int, names: list[str]
) -> list[CompletionRequest]:
    """One for each client."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.clients, settings.prompt_tokens)
    return [
        CompletionRequest(
            model=names[client % len(names)],
            prompt=tuple(prompt),
            new_tokens=settings.new_tokens,
            tells_tokens=False,
        )
        for client, prompt in enumerate(
            torch.randint(vocabulary, shape, generator=generator).tolist()
        )
    ]


def _ways(
    settings: ServeBenchConfig,
    client: Client,
    engine: Engine,
    catalog: Catalog,
    plain: Any,
    requests: list[CompletionRequest],
) -> dict[str, Callable[[], object]]:
    """The ways to get one answer to each client with eager steps."""
    ids = torch.tensor([each.prompt for each in requests])
    names, new_tokens = [each.model for each in requests], settings.new_tokens
    base, one = ([replace(each, model=name) for each in requests] for name in ("base", names[0]))
    return {
        "plain": lambda: generated(plain, ids, new_tokens),
        "base": lambda: asked(client, base),
        "route": routed(catalog.bank, engine.model, ids, names, new_tokens),
        "one": lambda: asked(client, one),
        OURS: lambda: asked(client, requests),
    }


def _peer_ways(
    name: str, peer: Other, requests: list[CompletionRequest]
) -> dict[str, Callable[[], object]]:
    """What another server is asked: each client its adapter, and all of them the base."""
    base = [replace(each, model="base") for each in requests]
    return {
        name: partial(asked, peer.client, requests, peer.ask),
        f"{name}, base": partial(asked, peer.client, base, peer.ask),
    }


def _goals(
    settings: ServeBenchConfig,
    rates: Mapping[str, float],
    changes: Mapping[str, Seconds],
    unlike: Rates,
) -> list[Goal]:
    step = changes["step"].median
    adapters = settings.adapters
    at_least = {
        "tokens/s over HTTP, against plain generate": (rates[OURS] / rates["plain"], 0.76),
        f"{adapters} adapters against 1, over HTTP": (rates[OURS] / rates["one"], 0.85),
        "tokens/s of unlike lengths that arrive at random, against one length": (
            unlike.arriving / rates[OURS],
            0.85,
        ),
        "tokens/s of unlike lengths that arrive at random, against static batches": (
            unlike.arriving / unlike.static,
            1.5,
        ),
    }
    if "vllm" in rates:
        at_least["tokens/s over HTTP, against vLLM's"] = (rates[OURS] / rates["vllm"], 3.0)
    at_most = {
        "a join against a step of all slots": (changes["join"].median / step, 0.15),
        "a leave against a step of all slots": (changes["leave"].median / step, 0.15),
        "routing of an unchanged step against the step": (changes["unchanged"].median / step, 0.01),
        "a step of all slots against reading its bytes": (step / changes["read"].median, 1.8),
    }
    return [
        *(Goal(what=w, got=g, limit=limit, at_least=True) for w, (g, limit) in at_least.items()),
        *(Goal(what=w, got=g, limit=limit) for w, (g, limit) in at_most.items()),
    ]

"""The decode step of a server in compiled code, beside the eager one and reading its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from transformers import DynamicCache

from lorakit.bench.result import Goal
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.bench.serving.asking import CompletionRequest
from lorakit.config.bench import ServeBenchConfig
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.requests import Use
from lorakit.serving.steps import Steps
from lorakit.serving.worker import Limits


def compiled_engine(settings: ServeBenchConfig, engine: Engine, catalog: Catalog) -> Engine:
    """Another engine on the model of one, whose steps are compiled as far as they can be."""
    limits = Limits(
        slots=settings.clients,
        prefill_tokens=settings.prefill_tokens,
        prefix_bytes=0,
        compile="wait",
    )
    made = Engine(engine.model, limits)
    made.warm_up([(catalog.held(name).updates, 1.0)] for name in catalog.adapters)
    return made


@torch.no_grad()
def step_times(
    engine: Engine, catalog: Catalog, requests: Sequence[CompletionRequest], *, repeats: int
) -> dict[str, Seconds]:
    """The times of a step of all slots, eager and compiled, and of reading the bytes it needs.

    Those are the weights, A and B of all slots, and the keys and values of the rows' tokens.

    Args:
        engine: whose steps are compiled, not yet started.
        catalog: of the adapters.
        requests: one for each slot, whose prompts the rows have read.
        repeats: how often each is measured.
    """
    slots, states = engine.slots, engine.keys_and_values
    for slot, each in enumerate(requests):
        slots.hold(slot, Use(((catalog.held(each.model), 1.0),)))
        cache = DynamicCache()
        with slots.used(slot, slot + 1):
            engine.decoder.read(each.prompt, cache)
        states.admit(slot, cache)
    used = range(len(requests))
    tokens = [each.prompt[-1] for each in requests]
    eager = Steps(engine.decoder, slots, states)
    own = states.size_bytes * (1 + max(states.lengths)) // states.columns
    weights = sum(p.nbytes for p in engine.model.parameters())
    moved = torch.ones((weights + slots.size_bytes + own) // 4)
    ways: dict[str, Callable[[], object]] = {
        "eager step": partial(eager.step, tokens, used),
        "compiled step": partial(engine.steps.step, tokens, used),
        "bytes": moved.sum,
    }
    seconds = interleaved(
        {name: Participant(run=run) for name, run in ways.items()}, repeats=repeats
    )
    for slot in used:
        states.free(slot)
    return seconds


def compiled_goals(rates: Mapping[str, float], steps: Mapping[str, Seconds]) -> list[Goal]:
    """Answers by compiled steps over those of the plain model, and a step over its bytes."""
    return [
        Goal(
            what="tokens/s over HTTP with compiled steps, against plain generate",
            got=rates["compiled"] / rates["plain"],
            limit=1.2,
            at_least=True,
        ),
        Goal(
            what="a compiled step of all slots against reading its bytes",
            got=steps["compiled step"].median / steps["bytes"].median,
            limit=1.8,
        ),
    ]

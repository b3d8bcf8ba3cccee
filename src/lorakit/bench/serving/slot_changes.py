"""What a slot's change costs beside a step, and a step beside reading its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.config.bench import ServeBenchConfig
from lorakit.routing.slots import Slots
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine


def slot_changes(
    settings: ServeBenchConfig, engine: Engine, catalog: Catalog, names: Sequence[str]
) -> dict[str, Seconds]:
    """The times of a step of all slots, of a slot's change, and of what surrounds them.

    `read` is the time to read as many bytes as a step does at least: the weights, and A and B of
    all slots. `unchanged` is the routing of a step in which nobody came or went.
    """
    model, slots = engine.model, Slots(engine.model, settings.clients, dtype=engine.model.dtype)
    held = [catalog.held(name) for name in names]
    for slot, each in enumerate(held):
        slots.join(slot, [(each.updates, 1.0)])
    ids = torch.zeros(settings.clients, 1, dtype=torch.long)
    turn = iter(range(10**9))

    def routed() -> None:
        with slots.used(0, settings.clients):
            pass

    @torch.no_grad()
    def step() -> None:
        with slots.used(0, settings.clients):
            model(input_ids=ids, use_cache=False)

    def join() -> None:
        at = next(turn)
        slots.join(at % len(held), [(held[(at + 1) % len(held)].updates, 1.0)])

    def leave() -> None:
        # The last row goes: its slot is free, and the next step is for one row fewer.
        engine.keys_and_values.free(settings.clients - 1)
        with slots.used(0, settings.clients - 1):
            pass

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    in_files = getattr(torch, settings.adapter_dtype).itemsize
    own = sum(map(catalog.bank.size_bytes, set(names))) * model.dtype.itemsize // in_files
    moved = torch.ones((weights + own) // 4)

    def read() -> None:
        moved.sum()

    participants = {
        "step": step,
        "join": join,
        "leave": leave,
        "unchanged": routed,
        "read": read,
    }
    return interleaved(
        {name: Participant(run=run) for name, run in participants.items()},
        repeats=settings.repeats,
    )

"""`lorakit bench soak`: one server under everything that clients do to it, and what it answered."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.bench.peers import save_random_adapters
from lorakit.bench.result import Findings, Goal
from lorakit.bench.serving.asking import CompletionRequest
from lorakit.bench.serving.process import ServerProcess, running
from lorakit.bench.soak.bad_adapters import refusing
from lorakit.bench.soak.crossing import crossing, seeded
from lorakit.bench.soak.leaving import holding_up, leaving
from lorakit.bench.soak.overloading import capacity, overloading
from lorakit.bench.soak.reloading import reloading
from lorakit.config.bench import SoakConfig
from lorakit.models.load import load_model

SPARES = 2
"""Adapters that come and go while others are asked."""


def measure_soak(settings: SoakConfig) -> Findings:
    """What a server answered to hurried, leaving, slow and too many clients, and to bad adapters.

    Raises:
        MissingExtraError: the libraries of the server are not installed.
        LorakitError: the server does not start, or answers nothing.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        vocabulary, folders = _adapters(settings, root / "served")
        kept = [_moved(folder, root / "kept") for folder in folders[settings.adapters :]]
        pool = _pool(settings, vocabulary, [each.name for each in folders[: settings.adapters]])
        size = sum(file.stat().st_size for file in folders[0].iterdir())
        words = [
            *("--model", settings.model, "--name", "base", "--adapters", str(root / "served")),
            *("--dtype", settings.dtype, "--slots", str(settings.connections)),
            *("--adapter-dtype", settings.adapter_dtype),
            *(["--batch-invariant"] if settings.batch_invariant else []),
            *("--waiting-requests", str(settings.connections)),
            *("--budget-bytes", str(settings.budget * size)),
        ]
        with running(words, threads=settings.threads) as server:
            spares = [shutil.copytree(each, root / "served" / each.name).name for each in kept]
            goals, tables = _measured(settings, server, pool, spares, folders[0])
    return Findings(timings={}, goals=tuple(goals), tables=tables)


def _measured(
    settings: SoakConfig,
    server: ServerProcess,
    pool: Sequence[CompletionRequest],
    spares: Sequence[str],
    good: Path,
) -> tuple[list[Goal], dict[str, list[dict[str, Any]]]]:
    client, connections = server.client, settings.connections
    crossed = crossing(server, pool, spares, requests=settings.requests, connections=connections)
    exact = settings.dtype == "float32"
    goals = crossed.goals(exact=exact)
    names = list(dict.fromkeys(each.model for each in pool))
    among = {"seeds": settings.seeds, "connections": connections}
    goals.append(seeded(client, pool[0], names, **among, exact=exact))
    # Slots are left for those that ask right after a reload, which else wait for one.
    goals += reloading(
        client, pool[0], spares, reloads=settings.reloads, connections=max(1, connections // 4)
    )
    refused, rows = refusing(client, pool[0], good, streams=connections // 2)
    goals += refused
    goals += leaving(client, pool[0], times=settings.closed)
    goals += holding_up(client, pool[0], others=connections // 2, probes=settings.probes)
    able = capacity(client, pool, connections=connections, seconds=settings.overload_s)
    overloaded, kinds = overloading(client, pool, able, seconds=settings.overload_s)
    return goals + overloaded, {"refused": rows, "overload": kinds}


def _adapters(settings: SoakConfig, place: Path) -> tuple[int, list[Path]]:
    """The number of the base's token ids, and the folders of random adapters."""
    model, _ = load_model(settings.model, dtype=settings.dtype)
    folders = save_random_adapters(
        model,
        place,
        count=settings.adapters + SPARES,
        rank=settings.rank,
        dtype=settings.adapter_dtype,
    )
    return int(model.config.vocab_size), folders


def _moved(folder: Path, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    return folder.rename(place / folder.name)


def _pool(settings: SoakConfig, vocabulary: int, names: Sequence[str]) -> list[CompletionRequest]:
    """Different requests: adapter, prompt and seed."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.pool, settings.prompt_tokens)
    prompts = torch.randint(vocabulary, shape, generator=generator).tolist()
    return [
        CompletionRequest(
            model=names[number % len(names)],
            prompt=tuple(prompt),
            new_tokens=settings.new_tokens,
            seed=number,
        )
        for number, prompt in enumerate(prompts)
    ]

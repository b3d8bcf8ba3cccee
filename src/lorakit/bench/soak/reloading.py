"""Whether an adapter that is replaced under load answers wholly as the old or wholly as the new."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lorakit.bench.result import Goal
from lorakit.bench.serving.asking import Client, CompletionRequest, Reply
from lorakit.errors import LorakitError

NAME = "turning"


def reloading(
    client: Client,
    asked: CompletionRequest,
    versions: Sequence[str],
    *,
    reloads: int,
    connections: int,
) -> list[Goal]:
    """Replace an adapter in place while clients ask for it.

    Args:
        client: of the server.
        asked: what the clients ask, whatever adapter it names.
        versions: two folders, one of which takes the other's place in turn.
        reloads: how often.
        connections: clients.

    Raises:
        LorakitError: an adapter cannot be loaded.
    """
    mine = replace(asked, model=NAME)
    first = replace(mine, new_tokens=1)
    right: dict[str, tuple[str, ...]] = {}
    for version in versions:
        _load(client, version)
        answer = client.complete(mine)
        right[answer.fingerprint] = answer.tokens
    prints = list(right)
    ended = threading.Event()
    with ThreadPoolExecutor(connections) as pool:
        asking = [pool.submit(_ask_until, client, mine, ended) for _ in range(connections)]
        stale = 0
        try:
            for turn in itertools.islice(itertools.cycle(range(len(versions))), reloads):
                _load(client, versions[turn])
                stale += client.complete(first).fingerprint != prints[turn]
        finally:
            ended.set()
        answers = [answer for each in asking for answer in each.result()]
    good = [answer for answer in answers if answer.is_good]
    mixed = sum(right.get(answer.fingerprint) != answer.tokens for answer in good)
    under = f"{len(answers):,} answers under {reloads:,} reloads"
    return [
        Goal.never(f"neither old nor new of {under}", mixed),
        Goal.never(f"failed of {under}", len(answers) - len(good)),
        Goal.never(f"old after the 200 of {reloads:,} reloads", stale),
    ]


def _ask_until(client: Client, asked: CompletionRequest, ended: threading.Event) -> list[Reply]:
    answers = []
    while not ended.is_set():
        answers.append(client.complete(asked))
    return answers


def _load(client: Client, folder: str) -> None:
    body = {"lora_name": NAME, "lora_path": folder, "load_inplace": True}
    answer = client.post("/v1/load_lora_adapter", body)
    if not answer.is_good:
        raise LorakitError(f"{folder} was not loaded: {answer.status}: {answer.body}")

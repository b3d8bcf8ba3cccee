"""The ways to answer one prompt of each client: plain, under a route, by the engine, over HTTP."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.bank import AdapterBank
from lorakit.bench.serving.asking import Client, CompletionRequest, Reply
from lorakit.errors import LorakitError
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.requests import Delta, Request, Use


@torch.inference_mode()
def generated(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """Prompts (rows, tokens) and as many likeliest tokens more, by transformers' `generate`."""
    written: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return written


def routed(
    bank: AdapterBank, model: Any, ids: Tensor, names: Sequence[str], new_tokens: int
) -> Callable[[], None]:
    """What answers the rows by `generate` under a route, each with its adapter."""

    def run() -> None:
        with bank.route(list(names)):
            generated(model, ids, new_tokens)

    return run


def answered(
    engine: Engine, catalog: Catalog, ids: Tensor, names: Sequence[str], new_tokens: int
) -> None:
    """Answers of the engine without HTTP."""
    inbox: queue.Queue[Delta] = queue.Queue()
    tokenizer: PreTrainedTokenizerBase = catalog.tokenizer
    engine.submit(
        [
            Request(
                prompt=row,
                use=Use(((catalog.held(name), 1.0),)),
                tokenizer=tokenizer,
                deliver=inbox.put,
                max_tokens=new_tokens,
            )
            for row, name in zip(ids.tolist(), names, strict=True)
        ]
    )
    going = len(names)
    while going:
        delta = inbox.get()
        if delta.error is not None:
            raise delta.error
        going -= delta.finish is not None


def asked(
    client: Client,
    requests: Sequence[CompletionRequest],
    ask: Callable[[Client, CompletionRequest], Reply] = Client.complete,
) -> None:
    """Answers over HTTP, all at once.

    Args:
        client: of the server.
        requests: what is asked.
        ask: in the words of the server.

    Raises:
        LorakitError: one is refused, or has not as many tokens as were asked for.
    """
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: ask(client, request), requests))
    for request, answer in zip(requests, answers, strict=True):
        written = answer.body["usage"]["completion_tokens"] if answer.is_good else 0
        if written != request.new_tokens:
            raise LorakitError(f"{written} of {request.new_tokens} tokens came: {answer.body}")

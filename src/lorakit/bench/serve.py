"""Tokens per second of a server whose clients use different adapters, beside `generate`."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.bank import AdapterBank
from lorakit.bench.peers import save_random_adapters
from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Participant, interleaved
from lorakit.config.bench import ServeBenchConfig
from lorakit.errors import MissingExtraError
from lorakit.models.load import load_model
from lorakit.routing.slots import Slots
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.requests import Delta, Request, Use
from lorakit.serving.worker import Limits


def measure_serve(settings: ServeBenchConfig) -> Findings:
    """The times of one answer to each client, by the plain model, by routes, and by the server.

    Raises:
        MissingExtraError: the libraries of the server are not installed.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtraError("the server", "serve") from None
    plain, _ = load_model(settings.model, dtype=settings.dtype)
    model, tokenizer = load_model(settings.model, dtype=settings.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        places = save_random_adapters(
            model,
            Path(temporary),
            count=settings.adapters,
            rank=settings.rank,
            dtype=settings.adapter_dtype,
        )
        limits = Limits(
            slots=settings.clients, prefill_tokens=settings.prefill_tokens, prefix_bytes=0
        )
        engine = Engine(model, limits)
        catalog = Catalog(model, tokenizer, "base", folder=Path(temporary))
        catalog.load_all()
    names = [places[client % len(places)].name for client in range(settings.clients)]
    return _measured(settings, engine, catalog, plain, names)


def _measured(
    settings: ServeBenchConfig,
    engine: Engine,
    catalog: Catalog,
    plain: Any,
    names: Sequence[str],
) -> Findings:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        plain.config.vocab_size, (settings.clients, settings.prompt_tokens), generator=generator
    )
    one = [names[0]] * len(names)
    changes = _changes(settings, engine, catalog, names)
    routed = _routed(catalog.bank, engine.model, ids, names, settings.new_tokens)
    with _served(engine, catalog) as port:
        seconds = interleaved(
            {
                "plain": Participant(run=lambda: _generated(plain, ids, settings.new_tokens)),
                "base": Participant(run=lambda: _asked(port, ids, ["base"] * len(names), settings)),
                "route": Participant(run=routed),
                "engine": Participant(
                    run=lambda: _answered(engine, catalog, ids, names, settings.new_tokens)
                ),
                "one": Participant(run=lambda: _asked(port, ids, one, settings)),
                OURS: Participant(run=lambda: _asked(port, ids, names, settings)),
            },
            repeats=settings.repeats,
        )
    tokens = settings.clients * settings.new_tokens
    by_name = {name: tokens / each.median for name, each in seconds.items()}
    ours = by_name[OURS]
    rows = [{"who": name, "tokens/s": rate} for name, rate in by_name.items()]
    return Findings(
        timings={"serve": seconds},
        goals=(
            Goal(
                what="tokens/s over HTTP, against plain generate",
                got=ours / by_name["plain"],
                limit=0.76,
                at_least=True,
            ),
            Goal(
                what=f"{settings.adapters} adapters against 1, over HTTP",
                got=ours / by_name["one"],
                limit=0.85,
                at_least=True,
            ),
            Goal(
                what="a join against a step of all slots",
                got=changes["join"].median / changes["step"].median,
                limit=0.15,
            ),
            Goal(
                what="routing of an unchanged step against the step",
                got=changes["unchanged"].median / changes["step"].median,
                limit=0.01,
            ),
        ),
        tables={
            "tokens": rows,
            "slots": [{"what": what, "time_s": each.median} for what, each in changes.items()],
        },
    )


def _changes(
    settings: ServeBenchConfig, engine: Engine, catalog: Catalog, names: Sequence[str]
) -> dict[str, Any]:
    """The times of a step of all slots, of a slot's change, and of a step's routing without one."""
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

    participants = {"step": step, "join": join, "unchanged": routed}
    return interleaved(
        {name: Participant(run=run) for name, run in participants.items()},
        repeats=settings.repeats,
    )


@torch.inference_mode()
def _generated(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    written: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return written


def _routed(
    bank: AdapterBank, model: Any, ids: Tensor, names: Sequence[str], new_tokens: int
) -> Callable[[], None]:
    def run() -> None:
        with bank.route(list(names)):
            _generated(model, ids, new_tokens)

    return run


def _answered(
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


def _asked(port: int, ids: Tensor, names: Sequence[str], settings: ServeBenchConfig) -> None:
    """Answers over HTTP, one to each client, all at once."""

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {
            "model": names[client],
            "prompt": ids[client].tolist(),
            "max_tokens": settings.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        written = answer["usage"]["completion_tokens"]
        assert written == settings.new_tokens, f"{written} tokens in {answer}"

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(ask, range(len(names))))


@contextmanager
def _served(engine: Engine, catalog: Catalog) -> Iterator[int]:
    """The port at which a server answers, inside a block."""
    import uvicorn

    from lorakit.serving.api.app import build_app

    engine.start()
    config = uvicorn.Config(build_app(engine, catalog), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
        listening.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()
            engine.close(drain=False)

"""A server from its settings: what answers, its adapters, the API, and their end."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.answering.answer import Note
from lorakit.attachment.attach import detach
from lorakit.attachment.open_model import open_model
from lorakit.config.serve import ServeConfig
from lorakit.data.chat import with_template
from lorakit.errors import ConfigError, MissingExtraError
from lorakit.models.load import config_of, fresh_heads, load_model, own_task
from lorakit.models.tasks import is_encoder
from lorakit.serving.catalog import EMBEDDING, ENCODING, Catalog
from lorakit.serving.encoder_engine import EncoderEngine
from lorakit.serving.engine import Engine
from lorakit.serving.heap import share_heap
from lorakit.serving.places import Places
from lorakit.serving.thread_teams import without_team
from lorakit.serving.worker import Limits, Worker

if TYPE_CHECKING:
    from lorakit.serving.api.backend import Backend

BACKLOG = 2048
"""Connections that the system keeps until they are accepted, as uvicorn has it."""
COPIES = ".copies"
"""The folder, in that of the adapters, of copies that upstream servers read."""


def say(text: str) -> None:
    """Tell what there is to know on stderr."""
    print(text, file=sys.stderr, flush=True)


def serve(adapters: str | os.PathLike[str] | None = None, **settings: Any) -> None:
    """Answer over HTTP with one base and many adapters, until the process is told to end.

    Args:
        adapters: the folder of adapters, each in a folder of its own.
        settings: those of `lorakit serve`, such as model="smollm2" or port=8001.

    Raises:
        LorakitError: a setting is wrong, or the model or an adapter can't be served.

    Examples:
        >>> lk.serve("out", model="smollm2")  # doctest: +SKIP
    """
    serve_until_told(ServeConfig(adapters=adapters, **settings), note=say)


def serve_until_told(settings: ServeConfig, *, note: Note) -> str:
    """Answer over HTTP until the process gets SIGTERM or SIGINT.

    Then new requests are refused, those that came are answered, and the server ends; a second
    signal ends it at once.

    Args:
        settings: of the verb.
        note: is called with what there is to know: where it listens, and that it ends.

    Returns:
        Where it listened.

    Raises:
        LorakitError: a setting is wrong, the model or an adapter can't be served, or the port is
            taken.
        MissingExtraError: the libraries of the server are not installed.
    """
    try:
        import fastapi  # noqa: F401
        import httpx2  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtraError("the server", "serve") from None
    from lorakit.serving.api.app import Policy, build_app
    from lorakit.serving.api.guard import check_host
    from lorakit.serving.api.keys import Keys
    from lorakit.serving.api.listening import answer_until_told

    share_heap()
    keys = Keys.read(settings.api_key_file)
    check_host(settings.host, keys)
    listening = _listening(settings)
    try:
        backend = (
            _relay(settings, note, listening.getsockname()[1])
            if settings.upstream
            else _own_engine(settings, note)
        )
        policy = Policy(keys=keys, lenient=settings.lenient, most_bytes=settings.most_bytes)
        app = build_app(backend, policy)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        # Who reads that it answers may ask at once: until the loop runs, the system keeps them.
        listening.listen(BACKLOG)
        names = ", ".join(backend.names.adapters) or "no adapters"
        note(f"{backend.names.name} with {names} answers at {url}/v1")
        answer_until_told(app, backend, listening, note)
    finally:
        listening.close()
    return url


def _own_engine(settings: ServeConfig, note: Note) -> Backend:
    """An engine of this process, which runs, and its models."""
    from lorakit.serving.api.own_engine import OwnEngine

    engine, catalog = prepared(settings, note=note)
    if settings.max_length is not None and settings.max_length > engine.max_length:
        note(f"max_length is {engine.max_length}: the model's context has no more tokens")
    engine.start()
    return OwnEngine(engine, catalog)


def _relay(settings: ServeConfig, note: Note, port: int) -> Backend:
    """Other servers, which are looked after, and their models.

    Raises:
        ConfigError: none of them can answer, or not with an adapter.
    """
    from lorakit.serving.fleet.fleet import Fleet
    from lorakit.serving.fleet.fleet_names import FleetNames
    from lorakit.serving.fleet.member_keys import read_keys
    from lorakit.serving.fleet.relay import Relay

    urls = list(settings.upstream)
    keys = read_keys(settings.upstream_key_file, urls)
    places = Places(settings.adapters, resolve=settings.resolve, hub=settings.hub)
    # A name that a server which is started again has too: what it could not clear away goes then.
    own = f"{socket.gethostname()}-{port}"
    copies = (places.folder or Path(tempfile.gettempdir())) / COPIES / own
    shutil.rmtree(copies, ignore_errors=True)
    fleet = Fleet(urls, keys, copies_in=copies, holders=settings.upstream_holders, note=note)
    names = FleetNames(fleet, settings.name or fleet.first.base, places)
    try:
        names.load_all()
    except ConfigError:
        fleet.close()
        raise
    return Relay(fleet, names)


def prepared(settings: ServeConfig, *, note: Note = say) -> tuple[Worker, Catalog]:
    """The engine, not yet started, and the models that it answers as.

    Args:
        settings: of the verb.
        note: is told what can't be compiled.

    Raises:
        LorakitError: the model or an adapter can't be served.
    """
    return without_team(partial(_prepared, settings, note))


def _prepared(settings: ServeConfig, note: Note) -> tuple[Worker, Catalog]:
    base = _base(settings)
    dtype = settings.adapter_dtype
    limits = Limits(
        slots=settings.slots,
        slot_rank=settings.slot_rank,
        max_length=settings.max_length,
        prefill_tokens=settings.prefill_tokens,
        prefix_bytes=settings.prefix_bytes,
        waiting_requests=settings.waiting_requests,
        waiting_tokens=settings.waiting_tokens,
        compile=settings.compile,
        batch_invariant=settings.batch_invariant,
    )
    if base.encodes and settings.batch_invariant:
        raise ConfigError(
            "batch_invariant is of models that write text, and this one is an encoder"
        )
    how: dict[str, Any] = {"adapter_dtype": None if dtype is None else getattr(torch, dtype)}
    engine: Worker = (
        EncoderEngine(base.model, limits, **how)
        if base.encodes
        else Engine(base.model, limits, note=note, **how)
    )
    catalog = Catalog(
        base.model,
        base.tokenizer,
        settings.name or base.name,
        folder=settings.adapters,
        resolve=settings.resolve,
        hub=settings.hub,
        allow_other_base=settings.allow_other_base,
        budget_bytes=settings.budget_bytes,
        encodes=base.encodes,
    )
    catalog.load_all()
    engine.warm_up([(catalog.held(name).updates, 1.0)] for name in catalog.adapters)
    return engine, catalog


@dataclass(frozen=True)
class _Base:
    """A base that is served, without adapters."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encodes: bool


def _base(settings: ServeConfig) -> _Base:
    """The base that settings or their one adapter name.

    Raises:
        ConfigError: neither says which it is.
        ModelError: it can't be found or loaded.
    """
    folder = settings.adapters
    single = folder is not None and (folder / CONFIG_FILE).is_file()
    adapter = Adapter.load(folder) if single and folder is not None else None
    name = settings.model or (adapter.base_name if adapter else "") or ""
    if not (name or adapter):
        raise ConfigError("model: name the base that is served, such as --model smollm2")
    task = TrainedUse.on(adapter.card).task if adapter else None
    if task in (*ENCODING, EMBEDDING) or (name and _encodes(name)):
        return _Base(name, *_encoder(settings, adapter, name), encodes=True)
    opened = open_model(
        adapter,
        model=settings.model,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        allow_other_base=settings.allow_other_base,
    )
    if opened.adapter is not None:
        detach(opened.model)
    tokenizer = with_template(opened.tokenizer, opened.base_template)
    return _Base(name, opened.model, tokenizer, encodes=False)


def _encodes(name: str) -> bool:
    """Whether a base reads a text at once, and writes none: an encoder, or a classifier."""
    return own_task(name) != "generation" or is_encoder(config_of(name))


def _encoder(
    settings: ServeConfig, adapter: Adapter | None, name: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base with a head for classes, which adapters have in their own form; or without, for
    adapters of embeddings."""
    task = _encoding(settings.adapters)
    how: dict[str, Any] = {"dtype": settings.dtype, "task": task, "device": settings.device}
    if adapter is not None:
        model, tokenizer = adapter.load_base(name or None, quantize=settings.quantize, **how)
    else:
        as_is = settings.quantize in ("none", "as-trained")
        model, tokenizer = load_model(name, quantize=None if as_is else settings.quantize, **how)
    for path in fresh_heads(model):
        # In a combination, weights that do not sum to 1 would add some of what was drawn.
        for parameter in model.get_submodule(path).parameters():
            parameter.data.zero_()
    return model, tokenizer


def _encoding(folder: Path | None) -> str:
    """The task that an encoder is loaded for: embedding, where the first adapter is of it."""
    for first in Places(folder).found()[:1]:
        with Adapter.reading(first) as adapter:
            if TrainedUse.on(adapter.card).task == EMBEDDING:
                return EMBEDDING
    return "classification"


def _listening(settings: ServeConfig) -> socket.socket:
    """A socket at the port, before anything slow.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    made = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((settings.host, settings.port))
    except OSError as error:
        made.close()
        where = f"{settings.host}, port {settings.port}"
        raise ConfigError(f"the server can't listen on {where}: {error.strerror}") from error
    return made

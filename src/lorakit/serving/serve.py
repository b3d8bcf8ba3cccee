"""A server from its settings: the base, its adapters, the engine, the API, and their end."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import torch

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.answering.answer import Note
from lorakit.attachment.attach import detach
from lorakit.attachment.open_model import Opened, open_model
from lorakit.config.verbs import ServeConfig
from lorakit.data.chat import with_template
from lorakit.errors import ConfigError, MissingExtraError
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine, Limits

BACKLOG = 2048
"""Connections that the system keeps until they are accepted, as uvicorn has it."""


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
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtraError("the server", "serve") from None
    from lorakit.serving.api.app import Policy, build_app
    from lorakit.serving.api.guard import check_host
    from lorakit.serving.api.keys import Keys
    from lorakit.serving.api.listening import answer_until_told

    keys = Keys.read(settings.api_key_file)
    check_host(settings.host, keys)
    listening = _listening(settings)
    try:
        engine, catalog = prepared(settings)
        policy = Policy(keys=keys, lenient=settings.lenient, most_bytes=settings.most_bytes)
        app = build_app(engine, catalog, policy)
        engine.start()
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        # Who reads that it answers may ask at once: until the loop runs, the system keeps them.
        listening.listen(BACKLOG)
        if settings.max_length is not None and settings.max_length > engine.max_length:
            note(f"max_length is {engine.max_length}: the model's context has no more tokens")
        names = ", ".join(catalog.adapters) or "no adapters"
        note(f"{catalog.name} with {names} answers at {url}/v1")
        answer_until_told(app, engine, listening, note)
    finally:
        listening.close()
    return url


def prepared(settings: ServeConfig) -> tuple[Engine, Catalog]:
    """The engine, not yet started, and the models that it answers as.

    Raises:
        LorakitError: the model or an adapter can't be served.
    """
    opened = _opened(settings)
    adapter_dtype = settings.adapter_dtype
    limits = Limits(
        slots=settings.slots,
        max_length=settings.max_length,
        prefill_tokens=settings.prefill_tokens,
        waiting_requests=settings.waiting_requests,
        waiting_tokens=settings.waiting_tokens,
    )
    engine = Engine(
        opened.model,
        limits,
        adapter_dtype=None if adapter_dtype is None else getattr(torch, adapter_dtype),
    )
    base = settings.model or (opened.adapter.base_name if opened.adapter else "")
    catalog = Catalog(
        opened.model,
        with_template(opened.tokenizer, opened.base_template),
        settings.name or base,
        folder=settings.adapters,
        resolve=settings.resolve,
        hub=settings.hub,
        allow_other_base=settings.allow_other_base,
        budget_bytes=settings.budget_bytes,
    )
    catalog.load_all()
    return engine, catalog


def _opened(settings: ServeConfig) -> Opened:
    """The base, without adapters.

    Raises:
        ConfigError: nothing says which it is, or it writes no text.
    """
    folder = settings.adapters
    single = folder is not None and (folder / CONFIG_FILE).is_file()
    if not (settings.model or single):
        raise ConfigError("model: name the base that is served, such as --model smollm2")
    opened = open_model(
        Adapter.load(folder) if single and folder is not None else None,
        model=settings.model,
        dtype=settings.dtype,
        quantize=settings.quantize,
        allow_other_base=settings.allow_other_base,
    )
    if opened.task != "generation":
        raise ConfigError(f"the model does {opened.task}, and the server writes text")
    if opened.adapter is not None:
        detach(opened.model)
    return opened


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

"""The API at a socket, until the process is told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from lorakit.answering.answer import Note
from lorakit.serving.api.backend import Closing

POLL_S = 0.1
"""How often a server that ends looks whether what answers has ended."""


class Listener(uvicorn.Server):
    """uvicorn's server without its own answer to signals: it would not wait for the answers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `answer_until_told`."""
        yield


def answer_until_told(app: FastAPI, backend: Closing, listening: socket.socket, note: Note) -> None:
    """Answer until SIGTERM or SIGINT comes, and then until those that asked have their answers.

    Meanwhile new requests are refused; a second signal ends everything at once.

    Args:
        app: the API.
        backend: that answers.
        listening: where requests come.
        note: is called with what happens.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    asyncio.run(_until_told(Listener(config), backend, listening, note))


async def _until_told(
    server: Listener, backend: Closing, listening: socket.socket, note: Note
) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        if told.is_set():
            note("told twice: ending at once")
            backend.close(drain=False, timeout_s=0.0)
            server.force_exit = True
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        # Signals come to the main thread alone, and to loops of Unix.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, tell)
    serving = asyncio.create_task(server.serve([listening]))
    telling = asyncio.create_task(told.wait())
    await asyncio.wait({serving, telling}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        note("ending: new requests are refused, those that came are answered")
        while not backend.close(timeout_s=0.0):
            await asyncio.sleep(POLL_S)
        server.should_exit = True
    telling.cancel()
    await serving
    if server.force_exit:
        # uvicorn leaves the app open then, whose end would be an error on stderr.
        await server.lifespan.shutdown()
    backend.close(drain=False)

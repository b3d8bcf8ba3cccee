"""Servers at ports of this process, and a front before them."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import uvicorn

from lorakit.serving.api.app import build_app
from lorakit.serving.fleet.fleet import Fleet
from lorakit.serving.fleet.fleet_names import FleetNames
from lorakit.serving.fleet.member import Patience
from lorakit.serving.fleet.relay import Relay
from lorakit.serving.places import Places
from serving.servers import DEFAULTS, Server

TIMEOUT_S = 60
HASTY = Patience(poll_s=0.05, first_retry_s=0.05, longest_retry_s=0.1)


class _Quick(uvicorn.Server):
    """uvicorn's server, which looks every 5 ms whether it should end, in place of 100 ms."""

    async def main_loop(self):
        import asyncio

        while not self.should_exit:
            await asyncio.sleep(0.005)


class Port:
    """An app at a port, in a thread of its own."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(128)
        self.number = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.number}"
        config = uvicorn.Config(app, log_level="critical", access_log=False)
        self._server = _Quick(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def close(self) -> None:
        """End at once, with whatever is being answered."""
        self._server.force_exit = self._server.should_exit = True
        # Not only the end of each connection: nobody is told of it.
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._thread.join()
        self._socket.close()


class Upstream:
    """A lorakit server at a port, that can be killed and started again."""

    def __init__(self, model: Any, adapters: Any, policy: Any = None, port: int = 0, **more: Any):
        self.server = Server(model, adapters, policy, **more)
        self.port = Port(self.server.app, port)
        self.url = self.port.url

    @property
    def held(self) -> set[str]:
        """The names that a front has loaded adapters under."""
        return {name for name in self.server.catalog.adapters if "@" in name}

    def close(self) -> None:
        """End at once."""
        self.port.close()
        self.server.engine.close(drain=False)


@dataclass(eq=False)
class Front:
    """A front before servers, and a client of it."""

    urls: list[str]
    adapters: Any
    policy: Any = None
    keys: dict[str, str] = field(default_factory=dict)
    holders: int | None = None
    resolve: bool = False
    patience: Patience = HASTY

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.fleet = Fleet(
            self.urls,
            self.keys,
            copies_in=self.adapters / ".copies" / "front",
            holders=self.holders,
            patience=self.patience,
            note=self.notes.append,
        )
        try:
            places = Places(self.adapters, resolve=self.resolve)
            self.names = FleetNames(self.fleet, self.fleet.first.base, places)
            self.names.load_all()
        except BaseException:
            self.fleet.close()
            raise
        self.relay = Relay(self.fleet, self.names, self.patience)
        self.port = Port(build_app(self.relay, self.policy))
        self.client = httpx.Client(base_url=self.port.url, timeout=TIMEOUT_S, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt: Any = "red cat", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", **DEFAULTS | {"prompt": prompt} | body)

    def chat(self, text: str = "red cat", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", **DEFAULTS | {"messages": messages} | body)

    @contextlib.contextmanager
    def stream(self, **body: Any) -> Any:
        """The events of a completion as they come."""
        body = DEFAULTS | {"prompt": "red cat", "stream": True} | body
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            yield (line.removeprefix("data: ") for line in response.iter_lines() if line.strip())

    def close(self) -> None:
        self.client.close()
        self.port.close()
        if not self.relay.close(timeout_s=1.0):
            self.relay.close(drain=False)


def chunks(events: Any) -> list[dict[str, Any]]:
    """The events of a stream up to its end."""
    *told, last = events
    assert last == "[DONE]"
    return [json.loads(each) for each in told]


def until(is_so: Any) -> None:
    """Wait until something is so."""
    end = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


class Slow:
    """Holds up a model before each step once it has made some."""

    def __init__(self, model: Any, after: int) -> None:
        self.left, self.go = after, threading.Event()
        self._hook = model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            self.go.wait(TIMEOUT_S)

    def end(self) -> None:
        self.go.set()
        self._hook.remove()

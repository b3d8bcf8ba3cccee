"""A client of a server: one request, and what a measurement needs to know of its answer."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 600.0
"""After which an answer is taken as lost."""


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A completion that a client wants."""

    model: str
    prompt: tuple[int, ...]
    new_tokens: int
    seed: int | None = None
    """With it tokens are drawn at temperature 1; None: the likeliest."""
    tells_tokens: bool = True
    """Whether the answer has its tokens beside its text."""

    def body(self) -> dict[str, Any]:
        """The request's body."""
        drawn = {"temperature": 0} if self.seed is None else {"temperature": 1, "seed": self.seed}
        return {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.new_tokens,
            "ignore_eos": True,
            "logprobs": 0 if self.tells_tokens else None,
            **drawn,
        }


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    body: Any
    """The JSON of it, or its text."""
    seconds: float
    headers: Mapping[str, str]

    @property
    def is_good(self) -> bool:
        """Whether it is an answer and no refusal."""
        return self.status == 200

    @property
    def fingerprint(self) -> str:
        """Which weights answered."""
        return str(self.body["system_fingerprint"])

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the completion."""
        return tuple(self.body["choices"][0]["logprobs"]["tokens"])


class Client:
    """Asks the server at a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, path: str, body: Mapping[str, Any] | bytes) -> Reply:
        """The answer to a body, over a connection of its own."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._asked("POST", path, raw)

    def get(self, path: str) -> Reply:
        """What a path answers."""
        return self._asked("GET", path, None)

    def complete(self, asked: CompletionRequest) -> Reply:
        """The completion of a prompt."""
        return self.post("/v1/completions", asked.body())

    def complete_all(self, asked: Sequence[CompletionRequest], connections: int) -> list[Reply]:
        """Completions in their order, so many at once."""
        with ThreadPoolExecutor(connections) as pool:
            return list(pool.map(self.complete, asked))

    @contextmanager
    def streaming(self, asked: CompletionRequest) -> Iterator[http.client.HTTPResponse]:
        """The response of a stream, inside a block at whose end the connection is closed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            body = json.dumps(asked.body() | {"stream": True})
            connection.request("POST", "/v1/completions", body, _JSON)
            yield connection.getresponse()
        finally:
            connection.close()

    def token_times(self, asked: CompletionRequest) -> list[float]:
        """When each event of a stream came, in seconds after the request."""
        begun = time.perf_counter()
        with self.streaming(asked) as response:
            return [time.perf_counter() - begun for line in response if line.startswith(b"data: {")]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = str(self.get("/metrics").body).splitlines()
        found = [
            line.rsplit(" ", 1) for line in lines if line.startswith((f"{name}{{", f"{name} "))
        ]
        return sum((float(value) for _, value in found), 0.0)

    def _asked(self, method: str, path: str, body: bytes | None) -> Reply:
        begun = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, body, _JSON)
            response = connection.getresponse()
            raw = response.read().decode()
        finally:
            connection.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        parsed = json.loads(raw) if "json" in headers.get("content-type", "") else raw
        return Reply(response.status, parsed, time.perf_counter() - begun, headers)


def streamed_tokens(lines: Iterable[bytes]) -> tuple[str, ...]:
    """The tokens of a stream's events.

    Raises:
        ValueError: an event is an error, or the stream does not end with [DONE].
    """
    told = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    if not told or told.pop() != b"[DONE]":
        raise ValueError("the stream does not end with [DONE]")
    tokens: list[str] = []
    for event in map(json.loads, told):
        if "error" in event:
            raise ValueError(event["error"]["message"])
        for choice in event["choices"]:
            tokens += (choice.get("logprobs") or {}).get("tokens", [])
    return tuple(tokens)


_JSON = {"Content-Type": "application/json"}

"""What answers the API's requests: this process's own engine, or a fleet of other servers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from lorakit.serving.api.bodies import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    TokenizeBody,
)
from lorakit.serving.api.keys import Rights
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.names import Names

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@runtime_checkable
class Closing(Protocol):
    """What ends once those that asked have their answers."""

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more requests."""

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end once those that came are answered, or at once.

        Returns:
            Whether it has ended.
        """


@runtime_checkable
class Backend(Closing, Protocol):
    """What the paths of the API answer with."""

    metrics: Metrics

    @property
    def names(self) -> Names[Any]:
        """The base and the adapters that requests may name."""

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and answer."""

    @property
    def is_alive(self) -> bool:
        """Whether it can answer at all."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""

    @property
    def lifespan(self) -> Lifespan | None:
        """What is open while the app runs; None: nothing."""

    def check_room(self) -> None:
        """Refuse what could not wait, before its body is read.

        Raises:
            QueueFullError: no request more may wait.
        """

    def health(self) -> dict[str, Any]:
        """What `/health` and `/ready` say of it to everybody, beside the rest."""

    def told(self, rights: Rights) -> dict[str, Any]:
        """What `/v1/adapters` says of it beside the rest, to a key with some rights."""

    @property
    def base_hash(self) -> str:
        """What stands for the base's weights in fingerprints."""

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Answer a request of /v1/completions."""

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        """Answer a request of /v1/chat/completions."""

    async def embed(self, body: EmbeddingsBody, http: HttpRequest) -> Response:
        """Answer a request of /v1/embeddings."""

    async def classify(self, body: ClassifyBody, http: HttpRequest) -> Response:
        """Answer a request of /v1/classify."""

    async def tokenize(self, body: TokenizeBody, http: HttpRequest) -> dict[str, Any]:
        """Answer a request of /tokenize."""

    async def detokenize(self, body: DetokenizeBody, http: HttpRequest) -> dict[str, Any]:
        """Answer a request of /detokenize."""

    async def tokenizer_info(self, model: str | None, http: HttpRequest) -> dict[str, Any]:
        """Answer a request of /tokenizer_info."""


def rights_of(http: HttpRequest) -> Rights:
    """What a request may do."""
    rights: Rights = http.state.rights
    return rights

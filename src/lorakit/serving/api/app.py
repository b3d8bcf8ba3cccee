"""The API as an application of FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lorakit.serving.api.backend import Backend, rights_of
from lorakit.serving.api.bodies import (
    Body,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    LoadBody,
    TokenizeBody,
    UnloadBody,
    check_known,
)
from lorakit.serving.api.errors import SHOWN, handle_errors
from lorakit.serving.api.guard import Guard
from lorakit.serving.api.inventory import inventory
from lorakit.serving.api.keys import Keys
from lorakit.serving.api.unique_keys import UniqueKeysRoute
from lorakit.serving.page import HEADERS, files
from lorakit.serving.refusals import RefusalError
from lorakit.upstream.versions import installed_version

VERSION = installed_version("lorakit") or "unknown"
_TEXT: dict[str, Any] = {
    # Without a type of its own, so that errors are described as the JSON that they are.
    "response_class": Response,
    "responses": {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
}
_STREAM: dict[str, Any] = {
    "responses": {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
}
FORMS = {
    "/metrics": _TEXT,
    "/v1/load_lora_adapter": _TEXT,
    "/v1/unload_lora_adapter": _TEXT,
    "/v1/completions": _STREAM,
    "/v1/chat/completions": _STREAM,
}
"""What paths answer beside or in place of JSON, for the API's own description."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the API lets clients do."""

    keys: Keys = field(default_factory=Keys)
    """One of which a request must have; none: no request needs one."""
    lenient: bool = False
    """Ignore unknown fields of bodies."""
    most_bytes: int = 8_000_000
    """The most bytes of a body."""


def build_app(backend: Backend, policy: Policy | None = None) -> FastAPI:
    """The API of what answers."""
    policy = policy or Policy()
    app = FastAPI(
        title="lorakit",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        responses=SHOWN,
        lifespan=backend.lifespan,
    )
    app.router.route_class = UniqueKeysRoute
    server = _Server(backend, policy)
    app.add_middleware(
        Guard,
        keys=policy.keys,
        most_bytes=policy.most_bytes,
        is_closing=lambda: backend.is_closing,
        check_room=backend.check_room,
    )
    handle_errors(app)
    for path, answer in server.gets.items():
        app.add_api_route(path, answer, methods=["GET"], **FORMS.get(path, {}))
    for path, answer in server.posts.items():
        app.add_api_route(path, answer, methods=["POST"], **FORMS.get(path, {}))
    for path, (content, kind) in files().items():
        app.add_route(path, _static(content, kind), methods=["GET"], include_in_schema=False)
    return app


def _static(content: bytes, kind: str) -> Callable[[Request], Any]:
    async def answer(http: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer


class _Server:
    """What each path answers."""

    def __init__(self, backend: Backend, policy: Policy) -> None:
        self._backend, self._names, self._policy = backend, backend.names, policy
        self.gets: dict[str, Callable[..., Any]] = {
            "/health": self.health,
            "/ready": self.ready,
            "/version": self.version,
            "/metrics": self.metrics,
            "/tokenizer_info": self.tokenizer_info,
            "/v1/adapters": self.adapters,
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
        }
        self.posts: dict[str, Callable[..., Any]] = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/embeddings": self.embeddings,
            "/v1/classify": self.classify,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }

    async def health(self) -> Response:
        """Whether there is anything that answers."""
        return self._status(self._backend.is_alive, "nothing answers any more")

    async def ready(self) -> Response:
        """Whether requests are taken."""
        return self._status(self._backend.is_ready, "the server is about to end, or can't answer")

    def _status(self, good: bool, otherwise: str) -> Response:
        if not good:
            raise RefusalError(otherwise, 503, retry_after_s=5)
        return JSONResponse({"status": "ok"} | self._backend.health())

    async def version(self) -> dict[str, str]:
        """The version of lorakit, and what stands for the base's weights in fingerprints."""
        return {"version": VERSION, "base_hash": self._backend.base_hash}

    def metrics(self, http: Request) -> Response:
        """Metrics for Prometheus; of adapters those that the key may ask."""
        rights = rights_of(http)
        text = self._backend.metrics.text(None if rights.adapters is None else rights.may_ask)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def adapters(self, http: Request) -> dict[str, Any]:
        """The adapters in figures, and those in the folder that are not loaded."""
        rights = rights_of(http)
        found = inventory(self._names, self._backend.metrics, rights)
        return found | self._backend.told(rights)

    async def models(self, http: Request) -> dict[str, Any]:
        """The base and the adapters."""
        may_ask = rights_of(http).may_ask
        names = [self._names.name, *filter(may_ask, self._names.adapters)]
        return {"object": "list", "data": [self._card(name) for name in names]}

    def model(self, model: str, http: Request) -> dict[str, Any]:
        """One of them."""
        return self._card(self._names.find(model, rights_of(http).check_names))

    def _card(self, name: str) -> dict[str, Any]:
        names = self._names
        loaded = names.adapters.get(name)
        return {
            "id": name,
            "object": "model",
            "created": names.since if loaded is None else loaded.since,
            "owned_by": "lorakit",
            "root": names.name if loaded is None else str(loaded.folder),
            "parent": None if loaded is None else names.name,
            "max_model_len": self._backend.max_length,
        }

    async def completions(self, body: CompletionBody, http: Request) -> Response:
        """Texts that go on with prompts."""
        self._check(body)
        return await self._backend.complete(body, http)

    async def chat(self, body: ChatBody, http: Request) -> Response:
        """The assistant's next turn of a conversation."""
        self._check(body)
        return await self._backend.chat(body, http)

    async def embeddings(self, body: EmbeddingsBody, http: Request) -> Response:
        """The embeddings of texts, each of length 1."""
        self._check(body)
        return await self._backend.embed(body, http)

    async def classify(self, body: ClassifyBody, http: Request) -> Response:
        """The classes of texts, and their probabilities."""
        self._check(body)
        return await self._backend.classify(body, http)

    def _check(self, body: Body) -> None:
        check_known(body, lenient=self._policy.lenient)

    def load(self, body: LoadBody, http: Request) -> Response:
        """Load an adapter, or with load_inplace replace one."""
        self._check(body)
        rights_of(http).check_load(body.lora_name, Path(body.lora_path).name)
        self._names.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    def unload(self, body: UnloadBody, http: Request) -> Response:
        """Forget an adapter."""
        self._check(body)
        rights_of(http).check_load(body.lora_name)
        self._names.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def tokenize(self, body: TokenizeBody, http: Request) -> dict[str, Any]:
        """The tokens of a text or of a conversation."""
        self._check(body)
        return await self._backend.tokenize(body, http)

    async def detokenize(self, body: DetokenizeBody, http: Request) -> dict[str, Any]:
        """The text of tokens."""
        self._check(body)
        return await self._backend.detokenize(body, http)

    async def tokenizer_info(self, http: Request, model: str | None = None) -> dict[str, Any]:
        """How texts become tokens, and with which chat template."""
        return await self._backend.tokenizer_info(model, http)

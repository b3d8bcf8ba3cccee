"""The API as an application of FastAPI."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from lorakit.data.row_types import Message
from lorakit.serving.api.answering import answered
from lorakit.serving.api.asking import check_ids, requests_of
from lorakit.serving.api.bodies import (
    Addressed,
    Asked,
    Body,
    CalledTool,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    MessageBody,
    TokenizeBody,
    UnloadBody,
    check_known,
)
from lorakit.serving.api.constraints import rule_of
from lorakit.serving.api.encoding import Encoding
from lorakit.serving.api.errors import SHOWN, handle_errors
from lorakit.serving.api.formats import ChatForm, CompletionForm, text_of
from lorakit.serving.api.guard import Guard
from lorakit.serving.api.inventory import inventory
from lorakit.serving.api.keys import Keys, Rights
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.api.tool_calls import Calling, Tools
from lorakit.serving.api.unique_keys import UniqueKeysRoute
from lorakit.serving.call_forms import CallForms
from lorakit.serving.catalog import Catalog, Chosen
from lorakit.serving.grammars import Grammars, Matcher
from lorakit.serving.page import HEADERS, files
from lorakit.serving.prompts import chat_ids, text_ids
from lorakit.serving.refusals import RefusalError
from lorakit.serving.worker import Worker

VERSION = version("lorakit")
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


def build_app(engine: Worker, catalog: Catalog, policy: Policy | None = None) -> FastAPI:
    """The API of an engine that runs, and of the models that it answers as."""
    policy = policy or Policy()
    app = FastAPI(title="lorakit", version=VERSION, docs_url=None, redoc_url=None, responses=SHOWN)
    app.router.route_class = UniqueKeysRoute
    server = _Server(engine, catalog, policy)
    app.add_middleware(
        Guard,
        keys=policy.keys,
        most_bytes=policy.most_bytes,
        is_closing=lambda: engine.is_closing,
        check_room=engine.queue.check_room,
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

    def __init__(self, engine: Worker, catalog: Catalog, policy: Policy) -> None:
        self._engine, self._catalog, self._policy = engine, catalog, policy
        self._metrics = Metrics(engine, catalog)
        self._grammars = Grammars(catalog.tokenizer, engine.vocabulary)
        self._call_forms = CallForms(self._grammars)
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
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        self.posts |= Encoding(engine, self._chosen, self._check, self._metrics).posts

    async def health(self) -> Response:
        """Whether the engine's thread runs."""
        return self._status(self._engine.is_alive, "the engine has ended")

    async def ready(self) -> Response:
        """Whether requests are taken."""
        ready = self._engine.is_alive and not self._engine.is_closing
        return self._status(ready, "the server is about to end")

    def _status(self, good: bool, otherwise: str) -> Response:
        if not good:
            raise RefusalError(otherwise, 503, retry_after_s=5)
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict[str, str]:
        """The version of lorakit."""
        return {"version": VERSION}

    def metrics(self) -> Response:
        """Metrics for Prometheus."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def adapters(self) -> dict[str, Any]:
        """The adapters in figures, and those in the folder that are not loaded."""
        return inventory(self._catalog, self._metrics)

    async def models(self) -> dict[str, Any]:
        """The base and the adapters."""
        names = [self._catalog.name, *self._catalog.adapters]
        return {"object": "list", "data": [self._card(name) for name in names]}

    def model(self, model: str, http: Request) -> dict[str, Any]:
        """One of them."""
        chosen = self._named(model, http)
        return self._card(next(iter(chosen.use.names), self._catalog.name))

    def _card(self, name: str) -> dict[str, Any]:
        catalog = self._catalog
        loaded = catalog.adapters.get(name)
        return {
            "id": name,
            "object": "model",
            "created": catalog.since if loaded is None else loaded.since,
            "owned_by": "lorakit",
            "root": catalog.name if loaded is None else str(loaded.folder),
            "parent": None if loaded is None else catalog.name,
            "max_model_len": self._engine.max_length,
        }

    async def completions(self, body: CompletionBody, http: Request) -> Response:
        """Texts that go on with prompts."""
        self._check(body)
        prompts = _prompts(body.prompt)

        def prepare() -> tuple[Chosen, list[Any], list[str]]:
            chosen = self._writer(body, http)
            ids = [text_ids(chosen, p) if isinstance(p, str) else p for p in prompts]
            asks_none = body.max_tokens == 0 and not body.echo
            if asks_none:
                raise RefusalError("max_tokens is 0: that goes with echo", param="max_tokens")
            requests = requests_of(
                body,
                ids,
                chosen,
                self._engine,
                max_tokens=body.max_tokens,
                alternatives=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                grammar=self._grammar(body, chosen),
                client=_rights(http).client,
            )
            texts = [p if isinstance(p, str) else text_of(chosen.tokenizer, p) for p in prompts]
            return chosen, requests, texts

        with self._engine.queue.reserved(len(prompts) * body.n):
            chosen, requests, texts = await run_in_threadpool(prepare)
        form = CompletionForm(chosen, logprobs=body.logprobs is not None)
        echoed = [text for text in texts for _ in range(body.n)] if body.echo else None
        return await answered(
            http, body, form, self._engine, requests, chosen, self._metrics, echoed
        )

    async def chat(self, body: ChatBody, http: Request) -> Response:
        """The assistant's next turn of a conversation."""
        self._check(body)
        tools = Tools.of(body)

        def prepare() -> tuple[Chosen, list[Any], Calling | None]:
            chosen = self._writer(body, http)
            alternatives = (body.top_logprobs or 0) if body.logprobs else None
            asked = body.max_completion_tokens or body.max_tokens
            if asked == 0:
                raise RefusalError("max_tokens is 0: give at least 1", param="max_tokens")
            calling = None
            if tools is not None:
                form = self._call_forms.of(chosen.tokenizer, chosen.ends)
                calling = Calling(tools=tools, form=form)
            grammar = self._grammar(body, chosen, calling)
            shown = [] if body.tool_choice == "none" else body.tools or []
            ids = chat_ids(
                chosen,
                _messages(body.messages),
                [tool.model_dump(exclude_none=True) for tool in shown],
            )
            requests = requests_of(
                body,
                [ids],
                chosen,
                self._engine,
                max_tokens=asked,
                alternatives=alternatives,
                grammar=grammar,
                client=_rights(http).client,
            )
            if calling is not None and calling.form.is_hidden(chosen.tokenizer):
                for request in requests:
                    request.skip_special = False
            return chosen, requests, calling

        with self._engine.queue.reserved(body.n):
            chosen, requests, calling = await run_in_threadpool(prepare)
        form = ChatForm(chosen, logprobs=bool(body.logprobs), calling=calling)
        return await answered(http, body, form, self._engine, requests, chosen, self._metrics)

    def _writer(self, body: Asked, http: Request) -> Chosen:
        """What writes the answer to a body.

        Raises:
            RefusalError: the base writes nothing.
        """
        if self._engine.encodes:
            raise RefusalError(
                f"{self._catalog.name} is an encoder, and writes no text: ask /v1/embeddings or "
                "/v1/classify",
                param="model",
            )
        return self._chosen(body, http)

    def _grammar(
        self, body: Asked, chosen: Chosen, calling: Calling | None = None
    ) -> Matcher | None:
        """What the answers to a body must be; None: anything."""
        rule = rule_of(body, calling)
        return None if rule is None else self._grammars.compiled(rule, chosen.ends)

    def _chosen(self, body: Addressed, http: Request) -> Chosen:
        pairs = None if body.adapters is None else [(a.name, a.weight) for a in body.adapters]
        check = _rights(http).check_names
        return self._catalog.choose(body.model, body.adapter_id, pairs, check=check)

    def _named(self, model: str | None, http: Request) -> Chosen:
        return self._catalog.choose(model, check=_rights(http).check_names)

    def _check(self, body: Body) -> None:
        check_known(body, lenient=self._policy.lenient)

    def load(self, body: LoadBody, http: Request) -> Response:
        """Load an adapter, or with load_inplace replace one."""
        self._check(body)
        _rights(http).check_load()
        self._catalog.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    def unload(self, body: UnloadBody, http: Request) -> Response:
        """Forget an adapter."""
        self._check(body)
        _rights(http).check_load()
        self._catalog.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def tokenize(self, body: TokenizeBody, http: Request) -> dict[str, Any]:
        """The tokens of a text or of a conversation."""
        self._check(body)
        chosen = self._named(body.model, http)
        if body.messages is not None:
            ids = chat_ids(chosen, _messages(body.messages))
        else:
            special = body.add_special_tokens
            tokenizer: Any = chosen.tokenizer
            ids = list(tokenizer(body.prompt, add_special_tokens=special)["input_ids"])
        found = {"count": len(ids), "max_model_len": self._engine.max_length, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = chosen.tokenizer.convert_ids_to_tokens(ids)
        return found

    def detokenize(self, body: DetokenizeBody, http: Request) -> dict[str, Any]:
        """The text of tokens."""
        self._check(body)
        chosen = self._named(body.model, http)
        check_ids(body.tokens, self._engine.vocabulary, "tokens")
        return {"prompt": str(chosen.tokenizer.decode(body.tokens))}

    def tokenizer_info(self, http: Request, model: str | None = None) -> dict[str, Any]:
        """How texts become tokens, and with which chat template."""
        tokenizer = self._named(model, http).tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": self._engine.max_length,
            **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }


def _rights(http: Request) -> Rights:
    """What a request may do."""
    rights: Rights = http.state.rights
    return rights


def _prompts(given: Any) -> list[str | list[int]]:
    """The prompts of a body, each a text or token ids."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise RefusalError("prompt is an empty list: give at least one", param="prompt")
    return list(given)


def _messages(given: Sequence[MessageBody]) -> list[Message]:
    return [Message(role=each.role, content=each.text, keys=_keys(each)) for each in given]


def _keys(message: MessageBody) -> dict[str, Any]:
    """What a chat template may write beside the content."""
    given = {name: getattr(message, name) for name in ("name", "tool_call_id")}
    if message.tool_calls:
        given["tool_calls"] = [_called(call) for call in message.tool_calls]
    return {name: value for name, value in given.items() if value is not None}


def _called(call: CalledTool) -> dict[str, Any]:
    """A call as templates want it: with its arguments as an object, where they are one."""
    function: dict[str, Any] = {"name": call.function.name, "arguments": call.function.arguments}
    with contextlib.suppress(ValueError):
        function["arguments"] = json.loads(call.function.arguments)
    return {"id": call.id, "type": "function", "function": function}

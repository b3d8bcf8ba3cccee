"""The API's answers from an engine in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from lorakit.data.row_types import Message
from lorakit.serving.api.answering import answered
from lorakit.serving.api.asking import check_ids, requests_of
from lorakit.serving.api.backend import Lifespan, rights_of
from lorakit.serving.api.bodies import (
    Addressed,
    Asked,
    CalledTool,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    MessageBody,
    TokenizeBody,
)
from lorakit.serving.api.constraints import rule_of
from lorakit.serving.api.encoding import Encoding
from lorakit.serving.api.engine_state import EngineState
from lorakit.serving.api.formats import ChatForm, CompletionForm, text_of
from lorakit.serving.api.keys import Rights
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.api.tool_calls import Calling, Tools
from lorakit.serving.call_forms import CallForms
from lorakit.serving.catalog import Catalog, Chosen
from lorakit.serving.grammars import Grammars, Matcher
from lorakit.serving.prompts import chat_ids, text_ids
from lorakit.serving.refusals import RefusalError
from lorakit.serving.worker import Worker


class OwnEngine:
    """An engine and the models that it answers as.

    Args:
        engine: that answers.
        catalog: of the models by their names.
    """

    def __init__(self, engine: Worker, catalog: Catalog) -> None:
        self._engine, self._catalog = engine, catalog
        self.metrics = Metrics(catalog, EngineState(engine, catalog))
        self._grammars = Grammars(catalog.tokenizer, engine.vocabulary)
        self._call_forms = CallForms(self._grammars)
        self._encoding = Encoding(engine, self._chosen, self.metrics)

    @property
    def names(self) -> Catalog:
        """The base and the adapters that requests may name."""
        return self._catalog

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and answer."""
        return self._engine.max_length

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._engine.is_alive

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._engine.is_closing

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end once those that came are answered, or at once."""
        return self._engine.close(drain=drain, timeout_s=timeout_s)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive and not self.is_closing

    @property
    def lifespan(self) -> Lifespan | None:
        """Nothing is open."""
        return None

    def check_room(self) -> None:
        """Refuse what could not wait.

        Raises:
            QueueFullError: no request more may.
        """
        self._engine.queue.check_room()

    def health(self) -> dict[str, Any]:
        """Nothing beside the rest."""
        return {}

    def told(self, rights: Rights) -> dict[str, Any]:
        """Nothing beside the rest."""
        return {}

    @property
    def base_hash(self) -> str:
        """What stands for the base's weights in fingerprints."""
        return self._catalog.base_hash

    async def complete(self, body: CompletionBody, http: Request) -> Response:
        """Texts that go on with prompts."""
        prompts = _prompts(body.prompt)

        def prepare() -> tuple[Chosen, list[Any], list[str]]:
            chosen = self._writer(body, http)
            ids = [text_ids(chosen, p) if isinstance(p, str) else p for p in prompts]
            asks_some = body.max_tokens != 0 or body.echo or body.prompt_logprobs is not None
            if not asks_some:
                raise RefusalError(
                    "max_tokens is 0: that goes with echo or prompt_logprobs", param="max_tokens"
                )
            requests = requests_of(
                body,
                ids,
                chosen,
                self._engine,
                max_tokens=body.max_tokens,
                alternatives=body.logprobs,
                echoed=body.logprobs if body.echo else None,
                grammar=self._grammar(body, chosen),
                client=rights_of(http).client,
            )
            # Nobody waits for the texts of tokens that are not given back.
            given = prompts if body.echo else []
            texts = [p if isinstance(p, str) else text_of(chosen.tokenizer, p) for p in given]
            return chosen, requests, texts

        with self._engine.queue.reserved(len(prompts) * body.n):
            chosen, requests, texts = await run_in_threadpool(prepare)
        form = CompletionForm(
            chosen, alternatives=body.logprobs, prompt_logprobs=body.prompt_logprobs
        )
        echoed = [text for text in texts for _ in range(body.n)] if body.echo else None
        return await answered(
            http, body, form, self._engine, requests, chosen, self.metrics, echoed
        )

    async def chat(self, body: ChatBody, http: Request) -> Response:
        """The assistant's next turn of a conversation."""
        tools = Tools.of(body)
        alternatives = (body.top_logprobs or 0) if body.logprobs else None

        def prepare() -> tuple[Chosen, list[Any], Calling | None]:
            chosen = self._writer(body, http)
            asked = body.max_completion_tokens or body.max_tokens
            if asked == 0 and body.prompt_logprobs is None:
                raise RefusalError(
                    "max_tokens is 0: give at least 1, or ask for prompt_logprobs",
                    param="max_tokens",
                )
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
                client=rights_of(http).client,
            )
            if calling is not None and calling.form.is_hidden(chosen.tokenizer):
                for request in requests:
                    request.skip_special = False
            return chosen, requests, calling

        with self._engine.queue.reserved(body.n):
            chosen, requests, calling = await run_in_threadpool(prepare)
        form = ChatForm(
            chosen,
            alternatives=alternatives,
            prompt_logprobs=body.prompt_logprobs,
            calling=calling,
        )
        return await answered(http, body, form, self._engine, requests, chosen, self.metrics)

    async def embed(self, body: EmbeddingsBody, http: Request) -> Response:
        """The embeddings of texts."""
        return await self._encoding.embeddings(body, http)

    async def classify(self, body: ClassifyBody, http: Request) -> Response:
        """The classes of texts."""
        return await self._encoding.classify(body, http)

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
        check = rights_of(http).check_names
        return self._catalog.choose(body.model, body.adapter_id, body.weighted, check=check)

    def _named(self, model: str | None, http: Request) -> Chosen:
        return self._catalog.choose(model, check=rights_of(http).check_names)

    async def tokenize(self, body: TokenizeBody, http: Request) -> dict[str, Any]:
        """The tokens of a text or of a conversation."""

        def tokens() -> dict[str, Any]:
            chosen = self._named(body.model, http)
            if body.messages is not None:
                ids = chat_ids(chosen, _messages(body.messages))
            else:
                special = body.add_special_tokens
                tokenizer: Any = chosen.tokenizer
                ids = list(tokenizer(body.prompt, add_special_tokens=special)["input_ids"])
            found = {"count": len(ids), "max_model_len": self.max_length, "tokens": ids}
            if body.return_token_strs:
                found["token_strs"] = chosen.tokenizer.convert_ids_to_tokens(ids)
            return found

        return await run_in_threadpool(tokens)

    async def detokenize(self, body: DetokenizeBody, http: Request) -> dict[str, Any]:
        """The text of tokens."""

        def text() -> dict[str, Any]:
            chosen = self._named(body.model, http)
            check_ids(body.tokens, self._engine.vocabulary, "tokens")
            return {"prompt": str(chosen.tokenizer.decode(body.tokens))}

        return await run_in_threadpool(text)

    async def tokenizer_info(self, model: str | None, http: Request) -> dict[str, Any]:
        """How texts become tokens, and with which chat template."""
        tokenizer = (await run_in_threadpool(self._named, model, http)).tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": self.max_length,
            **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }


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

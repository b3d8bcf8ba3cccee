"""The bodies of requests: fields of OpenAI, some of vLLM and LoRAX, and ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from lorakit.errors import did_you_mean
from lorakit.serving.refusals import RefusalError

MOST_CHOICES = 16
MOST_ALTERNATIVES = 20
MOST_INPUTS = 2048
"""The texts of a request to an encoder, as many as OpenAI allows."""
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """A body, or a part of one; what it has beside its fields is looked at by `check_known`."""

    model_config = ConfigDict(
        extra="allow",
        # The description tells what is so without --lenient.
        json_schema_extra={"additionalProperties": False},
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def check_known(body: Body, *, lenient: bool) -> None:
    """Refuse fields that nobody knows: a misspelt one would silently change nothing.

    Args:
        body: what was asked.
        lenient: forget such fields in place of refusing them.

    Raises:
        RefusalError: there are such; names them all, with the nearest known ones.
    """
    found = list(_unknown(body, "", forget=lenient))
    if found and not lenient:
        raise RefusalError("; ".join(text for _, text in found), param=found[0][0])


def _unknown(part: Any, path: str, *, forget: bool) -> Iterator[tuple[str, str]]:
    if isinstance(part, list):
        for index, each in enumerate(part):
            yield from _unknown(each, f"{path}[{index}]", forget=forget)
    if not isinstance(part, Body):
        return
    known = type(part).model_fields
    for name in part.model_extra or ():
        where = f"{path}.{name}" if path else name
        yield where, f"unknown field {where}{did_you_mean(name, known)}"
    for name in known:
        inner = f"{path}.{name}" if path else name
        yield from _unknown(getattr(part, name), inner, forget=forget)
    if forget and part.model_extra:
        part.model_extra.clear()


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool = False
    """Send the numbers of tokens in a last chunk without choices."""


class WeightedAdapter(Body):
    """An adapter of a weighted combination."""

    name: str
    weight: FiniteFloat = 1.0


class Addressed(Body):
    """What says which weights answer."""

    model: str | None = None
    """The base, an adapter, or BASE:ADAPTER."""
    adapter_id: str | None = None
    """An adapter, as LoRAX has it."""
    adapters: Annotated[list[WeightedAdapter], Field(min_length=1, max_length=16)] | None = None
    """Adapters whose updates are added up, each times its weight."""
    user: str | None = None
    """Not used."""

    @property
    def weighted(self) -> list[tuple[str, float]] | None:
        """The adapters and their weights."""
        return None if self.adapters is None else [(a.name, a.weight) for a in self.adapters]


class JsonSchema(Body):
    """A JSON schema with a name."""

    name: str | None = None
    description: str | None = None
    """Not used."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Not used: every answer obeys the schema."""


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and that with it")
        return self


class StructuredOutputs(Body):
    """The form of an answer, in the words of vLLM: one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A JSON schema."""
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    """Texts, one of which the answer is."""
    grammar: str | None = None
    """In Lark's form."""
    json_object: bool | None = None


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the arguments."""
    strict: bool | None = None
    """Not used: every call obeys the schema."""


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class Asked(Addressed):
    """What both kinds of completions have."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """The most tokens of an answer; less where the model's context ends."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    """How many answers; with a seed, each has one of its own."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    """Texts that end an answer."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 takes the likeliest token each time; None: 1."""
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Draw from so many of the likeliest tokens; 0 or -1: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.001, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    """Tokens that end an answer."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the model's own end, up to the most tokens."""
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    """Text, any JSON object, or what a JSON schema allows."""
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    """A JSON schema, in an older word of vLLM, as are the next ones."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Report each token of the prompt with its log-probability and rank, and so many of the
    likeliest in its place; not in a stream."""

    @field_validator("stream_options", "prompt_logprobs")
    @classmethod
    def _check_stream(cls, given: Any, info: Any) -> Any:
        # `info` is a protocol of pydantic's that can't be checked at run time.
        wanted, streams = info.field_name == "stream_options", info.data.get("stream")
        if None not in (given, streams) and streams != wanted:
            raise ValueError(f"goes with stream: {str(wanted).lower()}")
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class CompletionBody(Asked):
    """A request of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    """A text, several, or the same as token ids."""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Report each token's log-probability, and so many of the likeliest."""
    echo: bool = False
    """Give the prompt before the answer."""
    best_of: int | None = None
    """As many as n: nothing is searched."""
    suffix: None = None
    """Not supported."""

    @model_validator(mode="after")
    def _check_best(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be n: the server searches no better answers")
        return self


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """A function that was called."""

    name: str
    arguments: str = "{}"
    """In JSON."""


class CalledTool(Body):
    """A call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Not used: of the stream that it came in."""


class MessageBody(Body):
    """A turn of a conversation."""

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    """What an earlier turn of the assistant called."""
    tool_call_id: str | None = None
    """Of the call that a tool's turn answers."""
    refusal: str | None = None
    """Not used."""

    @property
    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatBody(Asked):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Report each token's log-probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """And so many of the likeliest."""
    tools: list[Tool] | None = None
    """Functions that the answer may call, or must, as `tool_choice` says."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """auto (text, or calls), which is meant where nothing is said; none, required, or one of the
    tools."""
    parallel_tool_calls: bool | None = None
    """false: the answer calls once at most."""
    store: bool | None = None
    """Not used."""
    metadata: dict[str, Any] | None = None
    """Not used."""
    service_tier: str | None = None
    """Not used."""

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self


class Pair(Body):
    """A text, and perhaps a second one, for what was trained on pairs."""

    text: str
    text_pair: str | None = None


Input = str | Pair | list[int] | list[str] | list[Pair] | list[list[int]]


class EncodedBody(Addressed):
    """What both kinds of requests have."""

    input: Input
    """A text, several, pairs of texts, or the same as token ids."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Cut what is longer to so many tokens; -1: to the model's context; None: refuse it."""


class EmbeddingsBody(EncodedBody):
    """A request of /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the bytes of 32-bit ones."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """As many as the model has."""


class ClassifyBody(EncodedBody):
    """A request of /v1/classify."""


class LoadBody(Body):
    """A request of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    """Its folder, in the folder of the server's adapters."""
    load_inplace: bool = False
    """Take the place of the adapter of that name."""


class UnloadBody(Body):
    """A request of /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None
    """Not used."""


class TokenizeBody(Body):
    """A request of /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1)] | None = None
    """A conversation in place of the prompt."""
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """A request of /detokenize."""

    model: str | None = None
    tokens: list[int]

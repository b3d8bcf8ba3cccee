"""From a body to requests of the engine, and from what these deliver to their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.serving.api.bodies import Asked
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.catalog import Chosen
from lorakit.serving.grammars import Matcher
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Delta, Request
from lorakit.serving.sampling import Sampling, Token
from lorakit.serving.worker import Worker


@dataclass(eq=False)
class Answer:
    """One answer as far as it has come."""

    request: Request
    index: int
    """The number of the choice."""
    prompt: str | None = None
    """The prompt's text, where it is given back."""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_tokens: tuple[Token | None, ...] = ()
    cached_tokens: int = 0
    """Those of the prompt that were read before."""
    output: Tensor | None = None
    """What an encoder gives."""
    finish: str | None = None
    stopped_by: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Go on with a step.

        Raises:
            Exception: the engine's error, where that ended the answer.
        """
        if delta.error is not None:
            raise delta.error
        self.text += delta.text
        self.tokens += delta.tokens
        self.offsets += delta.offsets
        self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        self.cached_tokens += delta.cached_tokens
        self.output = delta.output
        self.finish, self.stopped_by = delta.finish, delta.stopped_by


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """Refuse token ids that the model does not know.

    Raises:
        RefusalError: there are such.
    """
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise RefusalError(
            f"{param}: {wrong} is no token id: there are {vocabulary:,}, counted from 0",
            param=param,
        )


def requests_of(
    body: Asked,
    prompts: Sequence[Sequence[int]],
    chosen: Chosen,
    engine: Worker,
    *,
    max_tokens: int | None,
    alternatives: int | None,
    echoed: int | None = None,
    grammar: Matcher | None = None,
    client: str = "",
) -> list[Request]:
    """The requests of a body: for each prompt as many as it asks for.

    Args:
        body: what was asked.
        prompts: their token ids.
        chosen: what answers.
        engine: that is to answer.
        max_tokens: the most tokens of each answer; None: what the context leaves.
        alternatives: how many of the likeliest tokens to report; None: no log-probability.
        echoed: the same for the tokens of the prompt, which each answer gives back. What
            `prompt_logprobs` of the body asks for, the first answer to each prompt has.
        grammar: what each answer must be.
        client: who asks: clients take turns.

    Raises:
        RefusalError: a prompt is empty or too long, or a token is not known.
    """
    room = engine.max_length - len(chosen.use.virtual_tokens or ())
    for ids in prompts:
        _check_prompt(ids, room, engine, needs_room=max_tokens != 0)
    for name, tokens in (
        ("logit_bias", list(body.logit_bias or ())),
        ("stop_token_ids", body.stop_token_ids or []),
    ):
        check_ids(tokens, engine.vocabulary, name)
    told = [count for count in (echoed, body.prompt_logprobs) if count is not None]
    made = []
    for ids in prompts:
        left = room - len(ids)
        for number in range(body.n):
            request = Request(
                prompt=ids,
                use=chosen.use,
                tokenizer=chosen.tokenizer,
                deliver=_undelivered,
                max_tokens=left if max_tokens is None else min(max_tokens, left),
                sampling=_sampling(body, number, alternatives),
                grammar=None if grammar is None else grammar.copy(),
                ends=frozenset() if body.ignore_eos else chosen.ends,
                stop_tokens=frozenset(body.stop_token_ids or ()),
                stops=body.stops,
                include_stop=body.include_stop_str_in_output,
                skip_special=body.skip_special_tokens,
                prompt_logprobs=echoed if number else max(told, default=None),
                client=client,
            )
            made.append(request)
    return made


def _undelivered(delta: Delta) -> None:
    raise AssertionError("nobody listens yet")


def _check_prompt(ids: Sequence[int], room: int, engine: Worker, *, needs_room: bool) -> None:
    if not ids:
        raise RefusalError("the prompt is empty: it needs at least one token", param="prompt")
    if len(ids) + needs_room > room:
        virtual = engine.max_length - room
        taken = f", of which its virtual tokens take {virtual}" if virtual else ""
        raise RefusalError(
            f"This model's maximum context length is {engine.max_length} tokens{taken}, and the "
            f"prompt has {len(ids)}, which leaves no room for an answer: make it shorter",
            param="prompt",
        )
    check_ids(ids, engine.vocabulary, "prompt")


def _sampling(body: Asked, number: int, alternatives: int | None) -> Sampling:
    given: dict[str, Any] = {
        name: getattr(body, name)
        for name in (
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
        )
        if getattr(body, name) is not None
    }
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else body.seed + number,
        alternatives=alternatives,
        **given,
    )


class Answering:
    """Requests that are being answered, seen from the event loop.

    Args:
        engine: that answers.
        requests: what to answer.
        chosen: what answers them.
        metrics: where they are counted.
    """

    def __init__(
        self, engine: Worker, requests: Sequence[Request], chosen: Chosen, metrics: Metrics
    ) -> None:
        self.answers = [Answer(request, index) for index, request in enumerate(requests)]
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[Answer, Delta]] = asyncio.Queue()
        for answer in self.answers:
            answer.request.deliver = metrics.watched(
                answer.request, chosen.use.names, self._deliver_to(answer)
            )

    def _deliver_to(self, answer: Answer) -> Any:
        def deliver(delta: Delta) -> None:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (answer, delta))

        return deliver

    def submit(self) -> None:
        """Have the engine answer.

        Raises:
            QueueFullError: there is no room.
            ClosedError: the server is about to end.
        """
        self._engine.submit([answer.request for answer in self.answers])

    async def steps(self) -> AsyncIterator[tuple[Answer, Delta]]:
        """Each step of each answer, until all are over; leaving the loop cancels what is not.

        Raises:
            Exception: the engine's error, where that ended an answer.
        """
        going = len(self.answers)
        try:
            while going:
                answer, delta = await self._inbox.get()
                answer.add(delta)
                going -= delta.finish is not None
                yield answer, delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Have the engine stop whatever is not over."""
        for answer in self.answers:
            if answer.finish is None:
                answer.request.cancel()
        self._engine.wake()

    @property
    def usage(self) -> dict[str, Any]:
        """The numbers of tokens; a prompt of several answers counts once."""
        prompts = {id(answer.request.prompt): answer for answer in reversed(self.answers)}
        asked = sum(len(answer.request.prompt) for answer in prompts.values())
        cached = sum(answer.cached_tokens for answer in prompts.values())
        written = sum(len(answer.tokens) for answer in self.answers)
        return {
            "prompt_tokens": asked,
            "completion_tokens": written,
            "total_tokens": asked + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

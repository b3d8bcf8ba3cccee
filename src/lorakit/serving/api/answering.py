"""Responses: whole ones, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from lorakit.serving.api.asking import Answering
from lorakit.serving.api.bodies import Asked
from lorakit.serving.api.errors import envelope, refusal_of
from lorakit.serving.api.formats import Form
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.catalog import Chosen
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Request
from lorakit.serving.worker import Worker

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Of a stream, so that nothing on the way keeps it back."""


class EventStream(StreamingResponse):
    """Answers as events; when it ends, and for whatever reason, nobody answers on.

    Args:
        answering: what the events tell.
        events: of it.
    """

    def __init__(self, answering: Answering, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Where it was sending when the client left, the events end with the next collection
            # of garbage, some steps later.
            self._answering.cancel()


async def answered(
    http: HttpRequest,
    body: Asked,
    form: Form,
    engine: Worker,
    requests: Sequence[Request],
    chosen: Chosen,
    metrics: Metrics,
    echoed: Sequence[str | None] | None = None,
) -> Response:
    """The response to a body, whose requests are submitted here.

    Args:
        http: the request of HTTP, whose client may go away.
        body: what was asked.
        form: of the response.
        engine: that answers.
        requests: those of the body.
        chosen: what answers them.
        metrics: where they are counted.
        echoed: the texts that are given back before each answer.

    Raises:
        QueueFullError: there is no room.
        Exception: the engine's error, where the response is whole.
    """
    answering = Answering(engine, requests, chosen, metrics)
    if echoed is not None:
        for answer, text in zip(answering.answers, echoed, strict=True):
            answer.prompt = text
    answering.submit()
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(answering, form, with_usage=usage)
        return EventStream(answering, events)
    await finished(http, answering)

    def whole() -> Response:
        return JSONResponse(form.complete(answering.answers, answering.usage))

    # Log-probabilities of a long prompt are many texts, for which no stream should wait.
    has_prompts = any(answer.prompt_tokens for answer in answering.answers)
    return await run_in_threadpool(whole) if has_prompts else whole()


async def finished(http: HttpRequest, answering: Answering) -> None:
    """Wait until all answers are over; a client that goes away ends them.

    Raises:
        RefusalError: the server has ended one.
        Exception: the engine's error.
    """
    watching = asyncio.create_task(_cancel_when_gone(http, answering))
    try:
        async for _ in answering.steps():
            pass
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    if any(answer.finish == "cancelled" for answer in answering.answers):
        raise RefusalError("the request was ended: the server stops", 503, retry_after_s=5)


async def _cancel_when_gone(http: HttpRequest, answering: Answering) -> None:
    """Stop answering once the client has closed the connection."""
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            answering.cancel()
            return


async def _events(answering: Answering, form: Form, *, with_usage: bool) -> AsyncIterator[str]:
    """Yield the events of a stream; an error is one, too."""
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        for answer in answering.answers:
            opening = form.opening(answer)
            if opening is not None:
                yield event(form.event([opening], **empty))
        async for answer, delta in answering.steps():
            if delta.finish == "cancelled":
                raise RefusalError("the answer was ended: the server stops", 503)
            # A token may give no text yet; with log-probabilities it is told all the same.
            step = form.step(answer, delta)
            # So is a prompt that is given back.
            says = delta.text or step.get("text") or step["logprobs"]
            if says or delta.finish or delta.prompt_tokens:
                yield event(form.event([step], **empty))
        if with_usage:
            yield event(form.event([], usage=answering.usage))
    except Exception as error:
        yield event(envelope(refusal_of(error)))
    finally:
        answering.cancel()
    yield "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

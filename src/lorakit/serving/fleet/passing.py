"""One answer of another server on its way to the client, whole or as a stream of events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import anyio
import httpx2 as httpx
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorakit.serving.api.answering import HEADERS, event
from lorakit.serving.api.errors import envelope
from lorakit.serving.api.metrics import CountedRequest
from lorakit.serving.fleet.fleet import Fleet
from lorakit.serving.fleet.fleet_names import Lease
from lorakit.serving.fleet.member import Member
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import fingerprint_of, key_of

DATA = "data:"
DONE = "[DONE]"


class Passing:
    """An answer, to which the server is bound until it is over.

    Args:
        member: the server, which is given back at the end.
        lease: what answers.
        fleet: of the server.
    """

    def __init__(self, member: Member, lease: Lease, fleet: Fleet) -> None:
        self._member, self._lease, self._fleet = member, lease, fleet
        key = key_of([(version.content_hash, weight) for version, weight in lease.weighted])
        self._fingerprint = fingerprint_of(member.base_hash, key)
        self.response: httpx.Response | None = None

    def of(self, response: httpx.Response) -> Passing:
        """This answer, which begins with a response."""
        self.response = response
        return self

    async def __aenter__(self) -> Passing:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._fleet.release(self._member)
        if self.response is not None:
            # Also where the client has gone away: then the server is to stop.
            with anyio.CancelScope(shield=True):
                await self.response.aclose()

    async def whole(self) -> dict[str, Any]:
        """The whole answer.

        Raises:
            RefusalError: the server has died, or answers with other weights.
        """
        assert self.response is not None
        try:
            await self.response.aread()
            body = self.response.json()
        except httpx.TransportError as error:
            self._member.fail(f"it has broken off an answer ({error})")
            raise self.died(error) from None
        except ValueError:
            raise RefusalError(f"{self._member.url} answers with no JSON", 502) from None
        return self._named(body)

    async def events(self, counted: CountedRequest, *, with_usage: bool) -> AsyncIterator[str]:
        """Yield the events as they come; an error is one, too."""
        assert self.response is not None
        is_over = False
        try:
            async for data in _data_of(self.response):
                if data == DONE:
                    break
                chunk = json.loads(data)
                if "error" in chunk:
                    raise self.refusal(_error_in(chunk))
                chunk = self._named(chunk)
                _count(counted, chunk)
                if not with_usage:
                    chunk.pop("usage", None)
                if with_usage or chunk.get("choices"):
                    yield event(chunk)
            else:
                raise httpx.RemoteProtocolError("the stream has no end")
            is_over = True
        except (httpx.TransportError, ValueError) as error:
            self._member.fail(f"it has broken off a stream ({error})")
            is_over = True
            counted.end("error")
            yield event(envelope(self.died(error)))
        except RefusalError as refusal:
            is_over = True
            counted.end("error")
            yield event(envelope(refusal))
        finally:
            if not is_over:
                counted.end("cancelled")
        yield f"{DATA} {DONE}\n\n"

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer under the name that was asked for, with the fingerprint of what answered.

        Raises:
            RefusalError: it is from other weights.
        """
        if "model" not in body:
            return body
        told = body.get("system_fingerprint")
        if self._member.dialect.tells_content and told != self._fingerprint:
            reason = "it answers with other weights than it should"
            self._member.refuse(reason)
            raise RefusalError(f"{self._member.url}: {reason}", 502)
        return body | {"model": self._lease.name, "system_fingerprint": self._fingerprint}

    def refusal(self, told: RefusalError) -> RefusalError:
        """What the server says of a request, in the words of the front."""
        words = str(told)
        for version, _ in self._lease.weighted:
            words = words.replace(version.key, version.name)
        if told.status in (401, 403):
            return RefusalError(f"{self._member.url} refuses this server's key: {words}", 502)
        return RefusalError(
            words,
            told.status,
            param=told.param,
            kind=told.kind,
            retry_after_s=told.retry_after_s,
        )

    def died(self, error: Exception) -> RefusalError:
        """What the client is told where the server does not answer any more."""
        words = str(error) or type(error).__name__
        return RefusalError(f"{self._member.url} has broken off the answer: {words}", 502)


class RelayedStream(StreamingResponse):
    """A stream that ends what it is bound to, however it ends.

    Args:
        events: of the stream.
        bound: what is ended after them, also if they were never begun.
    """

    def __init__(self, events: AsyncIterator[str], bound: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._bound = bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with self._bound:
            await super().__call__(scope, receive, send)


async def _data_of(response: httpx.Response) -> AsyncIterator[str]:
    """Yield what the events of a stream say."""
    async for line in response.aiter_lines():
        if line.startswith(DATA):
            yield line.removeprefix(DATA).strip()


def _error_in(chunk: dict[str, Any]) -> RefusalError:
    error = chunk["error"]
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 502
    return RefusalError(
        str(error.get("message")), status, param=error.get("param"), kind=error.get("type")
    )


def _count(counted: CountedRequest, chunk: dict[str, Any]) -> None:
    """Count a chunk."""
    usage, choices = chunk.get("usage") or {}, chunk.get("choices") or []
    counted.add(read=usage.get("prompt_tokens", 0), written=usage.get("completion_tokens", 0))
    if any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in choices):
        counted.step()
    for choice in choices:
        if choice.get("finish_reason"):
            counted.end(choice["finish_reason"])

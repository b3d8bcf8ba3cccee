"""The API's answers from other servers, passed on under the names of the front."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
import httpx2 as httpx
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from lorakit.serving.api.backend import rights_of
from lorakit.serving.api.bodies import (
    Addressed,
    Asked,
    Body,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    EncodedBody,
    TokenizeBody,
)
from lorakit.serving.api.keys import Rights
from lorakit.serving.api.metrics import CountedRequest, Metrics
from lorakit.serving.fleet.fleet import Fleet
from lorakit.serving.fleet.fleet_names import FleetNames, Lease
from lorakit.serving.fleet.fleet_state import FleetState
from lorakit.serving.fleet.member import Member, Patience, told_by
from lorakit.serving.fleet.passing import Passing, RelayedStream
from lorakit.serving.refusals import RefusalError

Found = TypeVar("Found")
GONE_STATUS = 499
"""What nobody reads any more, as nginx calls it."""


class Relay:
    """A fleet and the models that it answers as.

    Args:
        fleet: the servers.
        names: of the models.
        patience: how long an answer is waited for.
    """

    def __init__(self, fleet: Fleet, names: FleetNames, patience: Patience | None = None) -> None:
        self._fleet, self._names = fleet, names
        self._patience = patience or Patience()
        self.metrics = Metrics(names, FleetState(fleet, names))
        self._client: httpx.AsyncClient | None = None
        self._going = 0
        self._closing = self._closed = False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The time in which connections to the servers are kept."""
        timeout = httpx.Timeout(self._patience.answer_s, connect=self._patience.connect_s)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
            self._client = client
            yield

    @property
    def names(self) -> FleetNames:
        """The base and the adapters that requests may name."""
        return self._names

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and answer, on whichever server."""
        return min((m.max_length for m in self._fleet.members if m.max_length), default=0)

    @property
    def base_hash(self) -> str:
        """What stands for the base's weights in fingerprints."""
        return self._fleet.first.base_hash

    @property
    def is_alive(self) -> bool:
        """Whether the front itself runs."""
        return not self._closed

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: at least one server answers."""
        return not self._closing and any(member.is_up for member in self._fleet.members)

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end once those that came are answered, or at once."""
        self._closing = True
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while drain and self._going:
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(0.01)
        if not self._closed:
            self._closed = True
            self._fleet.close(unload=drain)
        return True

    def check_room(self) -> None:
        """Nothing: each server has a queue of its own."""

    def health(self) -> dict[str, Any]:
        """Whether each server answers: up, down, or refused."""
        return {"upstreams": [member.state for member in self._fleet.members]}

    def told(self, rights: Rights) -> dict[str, Any]:
        """The servers, and what each holds of the adapters that a key may ask."""
        known = {each.key for each in self._fleet.versions if rights.may_ask(each.name)}
        return {"upstreams": [_shown(member, known) for member in self._fleet.members]}

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Texts that go on with prompts."""
        return await self._written("/v1/completions", body, http)

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        """The assistant's next turn of a conversation."""
        return await self._written("/v1/chat/completions", body, http)

    async def embed(self, body: EmbeddingsBody, http: HttpRequest) -> Response:
        """The embeddings of texts."""
        return JSONResponse(await self._whole("/v1/embeddings", body, http))

    async def classify(self, body: ClassifyBody, http: HttpRequest) -> Response:
        """The classes of texts."""
        return JSONResponse(await self._whole("/v1/classify", body, http))

    async def tokenize(self, body: TokenizeBody, http: HttpRequest) -> dict[str, Any]:
        """The tokens of a text or of a conversation."""
        return await self._whole("/tokenize", body, http)

    async def detokenize(self, body: DetokenizeBody, http: HttpRequest) -> dict[str, Any]:
        """The text of tokens."""
        return await self._whole("/detokenize", body, http)

    async def tokenizer_info(self, model: str | None, http: HttpRequest) -> dict[str, Any]:
        """How texts become tokens, and with which chat template."""
        async with self._leased(Addressed(model=model), http) as lease:
            passing = await self._asked("GET", "/tokenizer_info", {}, lease)
            async with passing:
                return await passing.whole()

    async def _whole(self, path: str, body: Body, http: HttpRequest) -> dict[str, Any]:
        """A whole answer; a client that goes away ends it."""
        async with self._leased(body, http) as lease:
            counted = CountedRequest(
                self.metrics, [v.name for v, _ in lease.weighted], began=time.monotonic()
            )
            try:
                answer = await _unless_gone(http, self._whole_of(path, body, lease))
            except RefusalError as error:
                if error.status >= 499 and isinstance(body, Asked | EncodedBody):
                    counted.end("cancelled" if error.status == GONE_STATUS else "error")
                raise
            if "usage" in answer:
                _count(counted, answer)
            return answer

    async def _whole_of(self, path: str, body: Body, lease: Lease) -> dict[str, Any]:
        passing = await self._asked("POST", path, _given(body), lease)
        async with passing:
            return await passing.whole()

    async def _written(self, path: str, body: Asked, http: HttpRequest) -> Response:
        """A text, whole or as a stream."""
        if not body.stream:
            return JSONResponse(await self._whole(path, body, http))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        given = _given(body) | {"stream_options": {"include_usage": True}}
        bound = contextlib.AsyncExitStack()
        try:
            lease = await bound.enter_async_context(self._leased(body, http))
            names = [version.name for version, _ in lease.weighted]
            counted = CountedRequest(self.metrics, names, began=time.monotonic())
            passing = await _unless_gone(http, self._asked("POST", path, given, lease))
            await bound.enter_async_context(passing)
        except BaseException:
            await bound.aclose()
            raise
        return RelayedStream(passing.events(counted, with_usage=with_usage), bound)

    @contextlib.asynccontextmanager
    async def _leased(self, body: Body, http: HttpRequest) -> AsyncIterator[Lease]:
        """What a body names, for as long as it is answered."""
        self._going += 1
        try:
            lease = await run_in_threadpool(self._chosen, body, http)
            try:
                yield lease
            finally:
                lease.end()
        finally:
            self._going -= 1

    def _chosen(self, body: Any, http: HttpRequest) -> Lease:
        check = rights_of(http).check_names
        if isinstance(body, Addressed):
            return self._names.choose(body.model, body.adapter_id, body.weighted, check=check)
        return self._names.choose(body.model, check=check)

    async def _asked(self, method: str, path: str, given: dict[str, Any], lease: Lease) -> Passing:
        """The beginning of an answer, from the first server that gives one.

        Raises:
            RefusalError: the request is refused, or no server answers it.
        """
        tried: set[Member] = set()
        again: Member | None = None
        latest: RefusalError | None = None
        while True:
            try:
                member = await self._member(lease, tried)
            except RefusalError as error:
                raise latest or error from None
            found = await self._begun(member, method, path, given, lease)
            if isinstance(found, Passing):
                return found
            if found is None:
                tried.add(member)
                continue
            latest = found
            if latest.status == 404 and lease.weighted and again is not member:
                # It has restarted, or somebody else has unloaded the adapter.
                again = member
                for version, _ in lease.weighted:
                    await run_in_threadpool(member.lost, version)
            elif latest.status in (429, 503):
                tried.add(member)
            else:
                raise latest

    async def _begun(
        self, member: Member, method: str, path: str, given: dict[str, Any], lease: Lease
    ) -> Passing | RefusalError | None:
        """The beginning of a server's answer, or why it gives none; None: it can't be reached.

        Raises:
            RefusalError: it can't be asked so, or has died before it answered.
        """
        passing = Passing(member, lease, self._fleet)
        try:
            response = await self._sent(member, method, path, given, lease)
            if response.status_code == 200:
                return passing.of(response)
            await response.aread()
            await response.aclose()
            return passing.refusal(told_by(response))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            member.fail(f"it does not answer ({error})")
            return None
        except httpx.TransportError as error:
            member.fail(f"it does not answer ({error})")
            raise passing.died(error) from None
        finally:
            if passing.response is None:
                self._fleet.release(member)

    async def _member(self, lease: Lease, tried: set[Member]) -> Member:
        """A server that holds what answers a request."""
        found = self._fleet.holder(lease.weighted, tried)
        if found is None:
            return await run_in_threadpool(self._fleet.bring, lease.weighted, tried)
        return found

    async def _sent(
        self, member: Member, method: str, path: str, given: dict[str, Any], lease: Lease
    ) -> httpx.Response:
        assert self._client is not None, "the app has not started"
        asked = member.dialect.asked(given, member.base, lease.weighted)
        how: dict[str, Any] = {"json": asked} if method == "POST" else {"params": asked}
        request = self._client.build_request(
            method, f"{member.url}{path}", headers=member.headers, **how
        )
        return await self._client.send(request, stream=True)


def _given(body: Body) -> dict[str, Any]:
    """What a client gave, in its own words."""
    return body.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _shown(member: Member, known: set[str]) -> dict[str, Any]:
    return {
        "url": member.url,
        "kind": member.dialect.name,
        "state": member.state,
        "reason": member.reason,
        "busy": member.busy,
        "answered": member.answered,
        "holds": sorted(member.holds & known),
    }


def _count(counted: CountedRequest, answer: dict[str, Any]) -> None:
    usage = answer["usage"]
    counted.add(read=usage.get("prompt_tokens", 0), written=usage.get("completion_tokens") or 0)
    counted.step()
    for choice in answer.get("choices") or answer.get("data") or [{}]:
        counted.end(choice.get("finish_reason") or "stop")


async def _unless_gone(http: HttpRequest, asking: Coroutine[Any, Any, Found]) -> Found:
    """What is awaited, unless the client goes away: that ends it.

    Raises:
        RefusalError: the client has gone away.
    """
    task = asyncio.create_task(asking)
    watching = asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in (task, watching):
            if not each.done():
                each.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task, watching})
    if task.cancelled():
        raise RefusalError("the client has gone away", GONE_STATUS)
    return task.result()


async def _gone(http: HttpRequest) -> None:
    """Wait until the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass

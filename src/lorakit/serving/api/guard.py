"""What stands before the API: keys, the size of bodies, and the end of the server."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import ConfigError, LorakitError
from lorakit.serving.api.errors import refusal_of, response_of
from lorakit.serving.api.keys import Keys
from lorakit.serving.page import files
from lorakit.serving.refusals import RefusalError

OPEN_PATHS = ("/health", "/ready", "/version", "/openapi.json", *files())
"""What is answered without a key: nothing of it says what is asked or answered."""
QUEUED_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classify")
"""Where requests wait for the engine."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def check_host(host: str, keys: Keys) -> None:
    """Refuse to listen where others can ask, if there are no keys.

    Raises:
        ConfigError: there are none.
    """
    if host not in LOOPBACK and not keys:
        raise ConfigError(
            f"host {host} can be reached from other machines: give --api-key-file, a file of keys,"
            " or listen on 127.0.0.1"
        )


class Guard:
    """Refuses what must not reach the API, and reads no more of a body than it may have.

    Args:
        app: the API.
        keys: of the server.
        most_bytes: the most bytes of a body.
        is_closing: whether the server is about to end.
        check_room: raises where no request more may wait, so that nobody reads its body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        most_bytes: int,
        is_closing: Callable[[], bool],
        check_room: Callable[[], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._most_bytes = most_bytes
        self._is_closing = is_closing
        self._check_room = check_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except LorakitError as error:
            await response_of(refusal_of(error))(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _check(self, scope: Scope) -> None:
        """Look at a request's head.

        Raises:
            RefusalError: it may not ask, or not this, or not now.
            QueueFullError: there is no room for what it asks.
        """
        headers = {name.lower(): value for name, value in scope["headers"]}
        path, posts = scope["path"], scope["method"] == "POST"
        if path not in OPEN_PATHS:
            rights = self._keys.rights_of(headers.get(b"authorization", b""))
            if rights is None:
                raise RefusalError(
                    "no key, or one that is not known: send Authorization: Bearer KEY", 401
                )
            scope.setdefault("state", {})["rights"] = rights
            if posts:
                rights.count_request()
        if posts and self._is_closing():
            raise RefusalError(
                "the server is about to end: ask another, or again later", 503, retry_after_s=5
            )
        if posts and path in QUEUED_PATHS:
            self._check_room()
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise RefusalError("Content-Length is no number")
        if int(length) > self._most_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited

    def _too_large(self) -> RefusalError:
        return RefusalError(f"the body has more than {self._most_bytes:,} bytes", 413)

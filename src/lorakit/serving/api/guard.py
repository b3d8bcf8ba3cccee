"""What stands before the API: keys, the size of bodies, and the end of the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import ConfigError
from lorakit.serving.api.errors import response_of
from lorakit.serving.refusals import RefusalError

OPEN_PATHS = ("/health", "/ready", "/version", "/docs", "/openapi.json")
"""What is answered without a key: nothing of it says what is asked or answered."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with # are none.

    Raises:
        ConfigError: the file cannot be read, has no key, or one that no header can hold.
    """
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: {file} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file: {file} has no keys: give one a line")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError(
            f"api_key_file: a key in {file} has spaces or other than ASCII characters"
        )
    return tuple(keys)


def check_host(host: str, keys: Sequence[str]) -> None:
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
        keys: one of which a request must have; none: no request needs one.
        most_bytes: the most bytes of a body.
        is_closing: whether the server is about to end.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        most_bytes: int,
        is_closing: Callable[[], bool],
    ) -> None:
        self._app = app
        self._hashes = [_hash(key) for key in keys]
        self._most_bytes = most_bytes
        self._is_closing = is_closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await response_of(refusal)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope) -> RefusalError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        if self._hashes and path not in OPEN_PATHS and not self._is_known(headers):
            return RefusalError(
                "no key, or one that is not known: send the header Authorization: Bearer KEY", 401
            )
        if scope["method"] == "POST" and self._is_closing():
            return RefusalError(
                "the server is about to end: ask another, or again later", 503, retry_after_s=5
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return RefusalError("Content-Length is no number")
        return self._too_large() if int(length) > self._most_bytes else None

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _hash(key.strip().decode("latin-1")) if scheme.lower() == b"bearer" else b""
        # Every key is compared, each in the same time, so that the time tells nothing.
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0

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


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

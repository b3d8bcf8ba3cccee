"""The keys of a server, and what each may do."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import ConfigError, did_you_mean
from lorakit.serving.refusals import RefusalError

MINUTE_S = 60.0
WORDS = ("adapters", "load", "requests")
"""What a line of a key file may say after the key."""


@dataclass(eq=False)
class Rights:
    """What the requests of one key may do; without a key, everything."""

    adapters: frozenset[str] | None = None
    """The adapters that they may name, beside the base; None: all."""
    load: bool = True
    """Whether they may load and unload adapters."""
    requests: int | None = None
    """The most of them in a minute; None: as many as they like."""
    client: str = ""
    """What tells this key from others in the queue, and is not the key."""
    _times: deque[float] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def may_ask(self, name: str) -> bool:
        """Whether an adapter may be named."""
        return self.adapters is None or name in self.adapters

    def check_names(self, names: Collection[str]) -> None:
        """Make sure that these adapters may be named.

        Raises:
            RefusalError: one may not.
        """
        barred = [name for name in names if not self.may_ask(name)]
        if barred:
            raise RefusalError(
                f"this key may not ask {', '.join(barred)}; it may ask the base"
                + "".join(f", {name}" for name in sorted(self.adapters or ())),
                403,
                param="model",
            )

    def check_load(self, *names: str) -> None:
        """Make sure that adapters of these names, and from folders of these, may be loaded.

        Raises:
            RefusalError: none may be, or not these.
        """
        if not self.load:
            raise RefusalError("this key may not load or unload adapters", 403)
        self.check_names(names)

    def count_request(self, now: float | None = None) -> None:
        """Count a request.

        Raises:
            RefusalError: there were as many in the last minute as there may be.
        """
        if self.requests is None:
            return
        now = time.monotonic() if now is None else now
        with self._lock:
            while self._times and now - self._times[0] >= MINUTE_S:
                self._times.popleft()
            if len(self._times) >= self.requests:
                wait = int(MINUTE_S - (now - self._times[0])) + 1
                raise RefusalError(
                    f"this key may make {self.requests} requests a minute: ask again later",
                    429,
                    retry_after_s=wait,
                )
            self._times.append(now)


EVERYTHING = Rights()


class Keys:
    """The keys of a server; a server without any asks for none.

    Args:
        rights: of each key.
    """

    def __init__(self, rights: dict[str, Rights] | None = None) -> None:
        self._by_hash = {_hash(key): own for key, own in (rights or {}).items()}
        for key, own in self._by_hash.items():
            own.client = key.hex()

    def __len__(self) -> int:
        return len(self._by_hash)

    def rights_of(self, authorization: bytes) -> Rights | None:
        """The rights that a header gives; None: none, as its key is not known."""
        if not self._by_hash:
            return EVERYTHING
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        given, found = _hash(key.strip().decode("latin-1")), None
        # Every key is compared, each in the same time, so that the time tells nothing.
        for known, own in self._by_hash.items():
            if hmac.compare_digest(given, known):
                found = own
        return found

    @staticmethod
    def read(file: Path | None) -> Keys:
        """The keys of a file: a line has a key, and what it may do if that is not everything.

        As in `KEY adapters=places,sql load=no requests=60`. Blank lines and those that begin with #
        are none.

        Raises:
            ConfigError: the file cannot be read, has no key, or lines that say something else; all
                of them are named by their numbers.
        """
        if file is None:
            return Keys()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file: {file} cannot be read: {error}") from error
        found: dict[str, Rights] = {}
        problems = []
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                try:
                    key, own = _parsed(line.split())
                    found[key] = own
                except ValueError as error:
                    problems.append(f"line {number}: {error}")
        if problems:
            raise ConfigError.listing(f"api_key_file: {file} can't be used", problems)
        if not found:
            raise ConfigError(f"api_key_file: {file} has no keys: give one a line")
        return Keys(found)


def _parsed(words: Sequence[str]) -> tuple[str, Rights]:
    """A key and its rights.

    Raises:
        ValueError: the line says something else. The key is not in the message.
    """
    key, *given = words
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the key is not ASCII")
    told: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if name not in WORDS or not equals or not value:
            hint = did_you_mean(name, WORDS)
            raise ValueError(f"{word} is none of adapters=NAME,…, load=yes|no, requests=N{hint}")
        told[name] = value
    if told.get("load", "yes") not in ("yes", "no"):
        raise ValueError(f"load={told['load']}: yes or no")
    if not told.get("requests", "1").isdigit() or told.get("requests") == "0":
        raise ValueError(f"requests={told['requests']}: a number from 1 on")
    return key, Rights(
        adapters=frozenset(told["adapters"].split(",")) if "adapters" in told else None,
        load=told.get("load", "yes") == "yes",
        requests=int(told["requests"]) if "requests" in told else None,
    )


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

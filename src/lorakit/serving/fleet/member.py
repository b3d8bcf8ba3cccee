"""One server behind the front: what it is, what it holds, and whether it answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import httpx2 as httpx

from lorakit.errors import LorakitError
from lorakit.serving.fleet.dialects import LORAKIT, VLLM, Dialect, fingerprint_of_vllm
from lorakit.serving.fleet.version import Version
from lorakit.serving.refusals import RefusalError

State = Literal["new", "up", "down", "refused"]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for, in seconds."""

    connect_s: float = 5.0
    """Until a connection is there."""
    load_s: float = 300.0
    """Until an adapter is loaded."""
    answer_s: float = 600.0
    """Until something more of an answer comes."""
    poll_s: float = 2.0
    """Between two looks at a server that answers."""
    first_retry_s: float = 0.5
    """Until a server that does not is tried again; twice as long each time."""
    longest_retry_s: float = 30.0


class DownError(LorakitError):
    """A server does not answer."""


class Member:
    """A server that answers for the front, watched by a thread of its own.

    Args:
        url: where it is, without /v1.
        key: that it asks for; None: none.
        patience: how long it is waited for.
        accept: is called when it is there, or there again; raises a LorakitError where it must not
            answer.
        note: is called with what happens to it.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        patience: Patience,
        *,
        accept: Callable[[Member], None],
        note: Callable[[str], None],
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.dialect: Dialect = LORAKIT
        self.base = ""
        """What it calls its base."""
        self.base_hash = ""
        """What stands for its base's weights in fingerprints."""
        self.max_length = 0
        self.state: State = "new"
        self.reason = "it was not asked yet"
        """Why it does not answer."""
        self.busy = 0
        """The requests that it is answering for this front."""
        self.answered = 0
        """Those that it was ever given."""
        self.turn = 0
        """The number of the latest of them, counted over all members."""
        self.holds: set[str] = set()
        """The keys of the versions that it was told to load."""
        self.admin = threading.RLock()
        """Held while adapters are loaded or unloaded there."""
        self._accept, self._note, self._patience = accept, note, patience
        self._failed_looks = 0
        self._closing = False
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        timeout = httpx.Timeout(patience.load_s, connect=patience.connect_s)
        self._client = httpx.Client(
            base_url=self.url, headers=self.headers, timeout=timeout, trust_env=False
        )
        self._thread = threading.Thread(target=self._run, name="lorakit-member", daemon=True)

    @property
    def is_up(self) -> bool:
        """Whether it may be asked."""
        return self.state == "up"

    def watch(self) -> None:
        """Begin to look after it."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, after what it has to do."""
        self._closing = True
        self.do(lambda: None)
        if self._thread.is_alive():
            self._thread.join()
        self._client.close()

    def do(self, job: Callable[[], None]) -> None:
        """Have the thread do something; what goes wrong there is left."""
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            try:
                self._jobs.get(timeout=self._pause_s())()
            except queue.Empty:
                self.look()
            except LorakitError as error:
                self._note(f"{self.url}: {error}")
            if self._closing and self._jobs.empty():
                return

    def _pause_s(self) -> float:
        if self.is_up:
            return self._patience.poll_s
        wait = self._patience.first_retry_s * 2.0 ** min(self._failed_looks, 16)
        return min(wait, self._patience.longest_retry_s)

    def look(self) -> None:
        """Find out whether it answers; where it did not before, what it is."""
        try:
            if self.is_up:
                self._get(self.dialect.ready_path)
                return
            self._meet()
            self._accept(self)
        except LorakitError as error:
            self._failed_looks += not self.is_up
            self._turn("down" if isinstance(error, DownError) else "refused", str(error))
        else:
            self._failed_looks = 0
            self._turn("up", "")

    def fail(self, reason: str) -> None:
        """Ask it no more, until it answers again."""
        self._turn("down", reason)

    def refuse(self, reason: str) -> None:
        """Ask it no more, since it answers wrongly, until it has loaded everything anew."""
        with self.admin:
            self.holds.clear()
        self._turn("refused", reason)

    def _turn(self, state: State, reason: str) -> None:
        was, self.state, self.reason = self.state, state, reason
        if state != was and not self._closing:
            self._note(f"{self.url} is {state}{f': {reason}' if reason else ''}")
            # The thread may be waiting for long.
            self.do(lambda: None)

    def _meet(self) -> None:
        """Ask what it is, and what of all that it was told to load it still holds."""
        told, listed = self._get("/version"), self._get("/v1/models").get("data")
        models = [each for each in listed or () if isinstance(each, dict) and "id" in each]
        card = next((each for each in models if not each.get("parent")), None)
        if card is None:
            raise DownError("/v1/models lists no base")
        base_hash = told.get("base_hash")
        self.dialect = LORAKIT if base_hash else VLLM
        self.base = str(card["id"])
        self.base_hash = base_hash or fingerprint_of_vllm(str(card.get("root")))
        self.max_length = int(card.get("max_model_len") or 0)
        with self.admin:
            self.holds &= {each["id"] for each in models}

    def _get(self, path: str) -> dict[str, Any]:
        """What a path answers.

        Raises:
            DownError: nothing, or that something is wrong.
        """
        try:
            response = self._client.get(path, timeout=self._patience.connect_s)
        except httpx.TransportError as error:
            raise DownError(_words(error)) from None
        if response.status_code in (401, 403):
            raise DownError(f"{path} asks for a key: give --upstream-key-file")
        if response.status_code != 200:
            raise DownError(f"{path} answers {response.status_code}")
        try:
            told = response.json()
        except ValueError:
            # vLLM's /health has no body.
            return {}
        return told if isinstance(told, dict) else {}

    def hold(self, version: Version) -> None:
        """Have it hold an adapter's content.

        Raises:
            DownError: it does not answer.
            RefusalError: it does not take it.
        """
        with self.admin:
            if version.key in self.holds:
                return
            response = self._post("/v1/load_lora_adapter", self.dialect.load_body(version))
            if "already been loaded" in response.text and response.status_code == 400:
                # What is there under this name was not loaded by this front.
                self._post("/v1/unload_lora_adapter", {"lora_name": version.key})
                response = self._post("/v1/load_lora_adapter", self.dialect.load_body(version))
            if response.status_code != 200:
                raise self._refusal(response, version)
            self.holds.add(version.key)

    def drop(self, version: Version) -> None:
        """Have it forget an adapter's content.

        Raises:
            DownError: it does not answer.
        """
        with self.admin:
            if version.key in self.holds:
                self.holds.discard(version.key)
                body = {"lora_name": version.key}
                self._post("/v1/unload_lora_adapter", body, timeout_s=self._patience.connect_s)

    def lost(self, version: Version) -> None:
        """Note that it does not know an adapter any more."""
        with self.admin:
            self.holds.discard(version.key)

    def figures(self, version: Version) -> dict[str, Any]:
        """What it tells of an adapter that it holds; empty, where it tells nothing."""
        if self.dialect is not LORAKIT:
            return {}
        listed = self._get("/v1/adapters").get("data", [])
        return next((each for each in listed if each["name"] == version.key), {})

    def _post(
        self, path: str, body: dict[str, Any], timeout_s: float | None = None
    ) -> httpx.Response:
        limit = self._patience.load_s if timeout_s is None else timeout_s
        try:
            return self._client.post(path, json=body, timeout=limit)
        except httpx.TransportError as error:
            raise DownError(_words(error)) from None

    def _refusal(self, response: httpx.Response, version: Version) -> RefusalError:
        """Why it did not load an adapter."""
        told, status = told_by(response), response.status_code
        words = str(told).replace(version.key, version.name)
        if status == 401:
            return RefusalError(f"{self.url} refuses this server's key: {words}", 502)
        if status == 404 and "lora" not in words.lower() and "adapter" not in words.lower():
            return RefusalError(
                f"{self.url} loads no adapters at run time: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
                502,
            )
        if status in (403, 404):
            return RefusalError(
                f"{self.url} does not see {version.copy}: this server and those behind it need "
                "the same files under the same paths (a shared file system), and a lorakit server "
                f"an --adapters folder that they are in. It says: {words}",
                502,
                param="lora_path",
            )
        told_status = status if 400 <= status < 500 else 502
        return RefusalError(f"{self.url}: {words}", told_status, param=told.param, kind=told.kind)


def told_by(response: httpx.Response) -> RefusalError:
    """The error that a server answers, in the words that it has."""
    try:
        body = response.json()
    except ValueError:
        body = {"message": response.text[:500]}
    error = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = error.get("message") or error.get("detail") or f"it answers {response.status_code}"
    wait = response.headers.get("retry-after", "")
    return RefusalError(
        str(message),
        response.status_code,
        param=error.get("param"),
        kind=error.get("type"),
        retry_after_s=int(wait) if wait.isdigit() else None,
    )


def _words(error: httpx.TransportError) -> str:
    return f"it does not answer ({str(error) or type(error).__name__})"

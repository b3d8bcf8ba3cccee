"""Servers in processes of their own, ours or others', whose ports and memory are known."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakit.bench.memory import resident_bytes
from lorakit.bench.serving.asking import Client
from lorakit.errors import LorakitError

START_S = 300.0
"""The longest that a server may take until it answers."""
END_S = 30
LOOK_S = 0.01
TOLD = 12
"""Lines of what a server said that are told where it did not start."""


@dataclass(frozen=True)
class ServerProcess:
    """A process that serves."""

    client: Client
    process: subprocess.Popen[bytes]
    start_s: float
    """From the start of the process until it took requests."""

    def resident_bytes(self) -> int | None:
        """Its memory, as it is now; None off Linux."""
        return resident_bytes(self.process.pid)


@contextmanager
def running(words: Sequence[str], *, threads: int | None) -> Iterator[ServerProcess]:
    """A server of `lorakit serve WORDS --port 0` on the CPU, inside a block.

    Raises:
        LorakitError: it ends before it answers; with what it said.
    """

    def ready(said: str) -> Client | None:
        found = re.search(r"answers at http://127\.0\.0\.1:(\d+)", said)
        return Client(int(found[1])) if found else None

    # What it is compared with is computed on the CPU, also where there is a GPU.
    own = ("--device", "cpu", "--port", "0")
    command = [sys.executable, "-m", "lorakit.cli", "serve", *words, *own]
    with started(command, ready, threads=threads) as server:
        yield server


@contextmanager
def started(
    command: Sequence[str],
    ready: Callable[[str], Client | None],
    *,
    threads: int | None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """A process that runs a server, inside a block.

    Args:
        command: what is run.
        ready: gives a client as soon as the server takes requests, from what it has said.
        threads: of OpenMP; None: as many as it takes by itself.
        environment: variables, in place of this process's; None: these.

    Raises:
        LorakitError: it ends before it answers, or takes too long; with what it said.
    """
    variables = dict(os.environ if environment is None else environment)
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        begun = time.perf_counter()
        with said.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
        try:
            client = _client(process, said, ready)
            yield ServerProcess(client, process, time.perf_counter() - begun)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _client(
    process: subprocess.Popen[bytes], said: Path, ready: Callable[[str], Client | None]
) -> Client:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        text = said.read_text(encoding="utf-8", errors="replace")
        client = ready(text)
        if client is not None:
            return client
        if process.poll() is not None:
            told = "\n".join(text.strip().splitlines()[-TOLD:])
            raise LorakitError(f"the server ended before it answered:\n{told}")
        time.sleep(LOOK_S)
    raise LorakitError(f"the server did not answer within {START_S:.0f} seconds")


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])

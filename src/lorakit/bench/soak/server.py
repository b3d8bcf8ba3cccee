"""A server in a process of its own, whose port and memory are known."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakit.bench.memory import resident_bytes
from lorakit.bench.serving.asking import Client
from lorakit.errors import LorakitError

START_S = 300.0
"""The longest that a server may take until it answers."""


@dataclass(frozen=True)
class ServerProcess:
    """A process that runs `lorakit serve`."""

    client: Client
    process: subprocess.Popen[bytes]
    start_s: float
    """From the start of the process to its first answer."""

    def resident_bytes(self) -> int | None:
        """Its memory, as it is now; None off Linux."""
        return resident_bytes(self.process.pid)


@contextmanager
def running(words: Sequence[str], *, threads: int | None) -> Iterator[ServerProcess]:
    """A server of `lorakit serve WORDS --port 0`, inside a block.

    Raises:
        LorakitError: it ends before it answers; with what it said.
    """
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        begun = time.perf_counter()
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "lorakit.cli", "serve", *words, "--port", "0"],
                stdout=output,
                stderr=output,
                env=environment,
            )
        try:
            client = Client(_port(process, said))
            yield ServerProcess(client, process, time.perf_counter() - begun)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen[bytes], said: Path) -> int:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        text = said.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"answers at http://127\.0\.0\.1:(\d+)", text)
        if found:
            return int(found[1])
        if process.poll() is not None:
            raise LorakitError(f"the server ended before it answered:\n{text.strip()}")
        time.sleep(0.01)
    raise LorakitError(f"the server did not answer within {START_S:.0f} seconds")

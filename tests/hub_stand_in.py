"""A stand-in of the hub on this machine, whose repositories can be listed and not all be read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from unittest.mock import patch

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "someone/gated": ("adapter_config.json", "adapter_model.safetensors", "config.json"),
    "someone/base": ("config.json", "model.safetensors"),
}
"""The repositories, and their files. What is gated can be listed by all, as on the hub."""


class StandIn(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks before it fetches a file, and lets nobody have one."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = next((name for name in FILES if f"/{name}/" in f"{self.path}/"), None)
        if name is None:
            self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
        elif "/resolve/" in self.path and name == "someone/gated":
            self.answer({"error": f"Access to model {name} is restricted"}, 403, "GatedRepo")
        elif "/resolve/" in self.path:
            self.answer({"error": "Entry not found"}, 404, "EntryNotFound")
        elif "/tree/" in self.path:
            entries = [{"type": "file", "oid": "0" * 40, "size": 9, "path": p} for p in FILES[name]]
            self.answer(entries)
        else:
            listed = [{"rfilename": file} for file in FILES[name]]
            self.answer({"id": name, "sha": COMMIT, "siblings": listed})

    do_HEAD = do_GET

    def answer(self, content: object, status: int = 200, error: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub_at(address: str) -> Iterator[None]:
    """Ask a hub at another address inside a `with` block."""
    constants = huggingface_hub.constants
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    with (
        patch.object(constants, "ENDPOINT", address),
        patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
        patch.object(constants, "HF_HUB_OFFLINE", False),
    ):
        yield


@contextmanager
def stand_in() -> Iterator[list[str]]:
    """Ask the stand-in inside a `with` block, which gets the list of what was asked."""
    asked: list[str] = []
    handler = type("Hub", (StandIn,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with hub_at(f"http://127.0.0.1:{server.server_port}"):
            yield asked
    finally:
        server.shutdown()
        server.server_close()

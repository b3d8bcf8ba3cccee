"""The page at /: two models asked at once, and adapters loaded and unloaded; static files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
HEADERS = {
    # Nothing from elsewhere, and nothing written into the page: what a model answers stays text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@cache
def files() -> dict[str, tuple[bytes, str]]:
    """The files of the page by their paths on the server, each with its type."""
    found = {}
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            found[path] = (file.read_bytes(), TYPES[file.suffix])
    return found

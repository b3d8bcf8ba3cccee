"""Bodies in which a key stands twice are refused: of two values one would be ignored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute


class UniqueKeysRoute(APIRoute):
    """A path whose bodies have each key once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle


class _Request(Request):
    async def json(self) -> Any:
        """The body as JSON.

        Raises:
            HTTPException: an object in it has a key twice.
        """
        return json.loads(await self.body(), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = ", ".join(repr(name) for name, count in counts.items() if count > 1)
        # Other errors of this step become FastAPI's own.
        raise HTTPException(400, f"the body has {twice} more than once in one object: give one")
    return found

"""lorakit under Ray Serve: each replica has the base, and answers with the adapters that it holds.

    pip install '.[serve,gguf,ray]'
    python examples/ray_serve.py smollm2 out/      # http://127.0.0.1:8000/v1/chat/completions

Ray sends a request to a replica that has its adapter, or has one load it. Each answer says in
X-Replica which one gave it. Requests call the base "base", whatever model it is. There are no keys:
whoever reaches Ray's port may ask, and load and unload adapters.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from lorakit.config.serve import ServeConfig
from lorakit.errors import LorakitError
from lorakit.serving.api.app import build_app
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.serve import prepared


@serve.deployment(num_replicas=2, max_ongoing_requests=64)
class Replica:
    """The server of one process: the base, its engine, and the API as an application."""

    def __init__(self, model: str, adapters: str) -> None:
        settings = ServeConfig(
            model=model, adapters=adapters, name="base", resolve=True, budget_bytes=500_000_000
        )
        engine, self.catalog = prepared(settings)
        engine.start()
        self.app = build_app(OwnEngine(engine, self.catalog))
        self.id = serve.get_replica_context().replica_id.unique_id

    @serve.multiplexed(max_num_models_per_replica=16)
    async def adapter(self, name: str) -> str:
        """Load an adapter; Ray remembers who has it, and the bank keeps to its memory."""
        await asyncio.to_thread(self.catalog.choose, name)
        return name

    async def answer(self, method: str, path: str, body: bytes) -> AsyncIterator[Any]:
        """Yield the status, the headers, and then the answer in pieces."""
        with contextlib.suppress(LorakitError):
            await self.adapter(serve.get_multiplexed_model_id() or "base")
        given, over = [{"type": "http.request", "body": body}], asyncio.Event()
        told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def receive() -> dict[str, Any]:
            if not given:
                await over.wait()
            return given.pop() if given else {"type": "http.disconnect"}

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"}
        running = asyncio.create_task(self.app(scope, receive, told.put))
        try:
            start = await told.get()
            found = {name.decode(): value.decode() for name, value in start["headers"]}
            yield start["status"], found | {"x-replica": self.id}
            part: dict[str, Any] = {"more_body": True}
            while part.get("more_body"):
                part = await told.get()
                yield part.get("body", b"")
        finally:
            # Where the client has gone away, the engine stops answering.
            over.set()
            await running


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Front:
    """Reads which adapter a request is for."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas.options(stream=True)

    async def __call__(self, http: Request) -> StreamingResponse:
        """Pass a request on to a replica, and its answer back."""
        body, name = await http.body(), "base"
        with contextlib.suppress(ValueError, AttributeError):
            name = str(json.loads(body).get("model") or name)
        handle = self.replicas.options(multiplexed_model_id=name)
        pieces = handle.answer.remote(http.method, http.url.path, body)
        status, headers = await anext(pieces)
        return StreamingResponse(pieces, status, headers)


if __name__ == "__main__":
    model, adapters = sys.argv[1:]
    serve.run(Front.bind(Replica.bind(model, adapters)), blocking=True)

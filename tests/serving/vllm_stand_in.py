"""A stand-in for vLLM's server: its paths, bodies and words as it documents them, and no model.

An answer's text is what was asked, so that a test sees it.
"""

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

BASE = "tiny"


def error(status: int, kind: str, message: str) -> Response:
    told = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": told}, status)


class VllmStandIn:
    """The app, what it was sent, and the adapters that it was told to load."""

    def __init__(self, *, loads: bool = True) -> None:
        self.app = FastAPI()
        self.url = ""
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, str] = {}
        self.app.get("/version")(lambda: {"version": "0.11.0"})
        self.app.get("/health")(lambda: Response(status_code=200))
        self.app.get("/v1/models")(self.models)
        posts = {"/v1/completions": self.answer, "/v1/chat/completions": self.answer}
        if loads:
            # VLLM_ALLOW_RUNTIME_LORA_UPDATING
            posts |= {"/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
        for path, answer in posts.items():
            self.app.post(path)(answer)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for sent, body in self.sent if sent == path]

    def models(self) -> dict[str, Any]:
        base = {"id": BASE, "root": "/models/tiny", "parent": None, "max_model_len": 64}
        others = [
            {"id": name, "root": path, "parent": BASE} for name, path in self.adapters.items()
        ]
        return {"object": "list", "data": [base, *others]}

    async def _body(self, request: Request) -> Any:
        body = await request.json()
        self.sent.append((request.url.path, body))
        return body

    async def load(self, request: Request) -> Response:
        body = await self._body(request)
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            message = f"The lora adapter '{name}' has already been loaded."
            return error(400, "InvalidUserInput", message)
        if not (Path(path) / "adapter_config.json").is_file():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            return error(404, "NotFoundError", message)
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await self._body(request))["lora_name"]
        if self.adapters.pop(name, None) is None:
            return error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def answer(self, request: Request) -> Response:
        body = await self._body(request)
        name = body["model"]
        if name not in (BASE, *self.adapters):
            return error(404, "NotFoundError", f"The model `{name}` does not exist.")
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": name}
        choice = {"index": 0, "text": json.dumps(body), "finish_reason": "stop"}
        if body.get("stream"):
            last = {"choices": [], "usage": usage}
            told = [json.dumps(head | each) for each in ({"choices": [choice]}, last)]
            events = (f"data: {each}\n\n" for each in [*told, "[DONE]"])
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(head | {"choices": [choice], "usage": usage})

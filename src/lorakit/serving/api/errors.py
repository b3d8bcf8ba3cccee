"""Every error of the API in OpenAI's envelope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.serving.admission import ClosedError, QueueFullError
from lorakit.serving.refusals import KINDS, RefusalError


class Problem(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None
    code: int


class Envelope(BaseModel):
    """The body of every error."""

    error: Problem


SHOWN: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Envelope, "description": "What is wrong with the request."},
    "5XX": {"model": Envelope, "description": "What is wrong with the server."},
}
"""The errors of each path in the API's own description."""


def envelope(refusal: RefusalError) -> dict[str, Any]:
    """The body of an error's response."""
    return {
        "error": {
            "message": _encodable(str(refusal)),
            "type": refusal.kind,
            "param": None if refusal.param is None else _encodable(refusal.param),
            "code": refusal.status,
        }
    }


def _encodable(text: str) -> str:
    """A text as UTF-8 can have it: names of fields may have halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


def refusal_of(error: Exception) -> RefusalError:
    """What the client is told of an error."""
    match error:
        case RefusalError():
            return error
        case QueueFullError():
            return RefusalError(str(error), 429, retry_after_s=error.retry_after_s)
        case ClosedError():
            return RefusalError(str(error), 503, retry_after_s=5)
        case AdapterFileError() if "there is no adapter folder" in str(error):
            return RefusalError(str(error), 404, param="lora_path")
        case LorakitError():
            return RefusalError(str(error))
        case RequestValidationError() | ValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            return RefusalError(str(error.detail), error.status_code)
        case _:
            return RefusalError(f"the server failed: {type(error).__name__}: {error}", 500)


def _of_validation(problems: Any) -> RefusalError:
    """All that is wrong with a body, as one refusal."""
    lines = dict.fromkeys(map(_line, problems))
    return RefusalError("; ".join(lines), param=_where(problems[0]) if problems else None)


def _line(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}, character {problem['loc'][-1]}"
    return f"{_where(problem)}: {problem['msg']}"


def _where(problem: Mapping[str, Any]) -> str:
    """The field of a problem: without the word for the body and the forms that a union tries."""
    parts = [part for part in problem["loc"] if part != "body"]
    forms = ("str", "list[", "float", "int", "function", "nullable", "constrained", "json-or")
    named = [str(p) for p in parts if not (isinstance(p, str) and p.startswith(forms))]
    return ".".join(named) or "body"


def response_of(refusal: RefusalError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response that refuses a request."""
    made = dict(headers or {})
    if refusal.retry_after_s is not None:
        made["Retry-After"] = str(refusal.retry_after_s)
    if refusal.status == 401:
        made["WWW-Authenticate"] = "Bearer"
    return JSONResponse(envelope(refusal), refusal.status, headers=made)


def handle_errors(app: FastAPI) -> None:
    """Have an app answer every error in the envelope."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        headers = getattr(error, "headers", None)
        refusal = refusal_of(error)
        if isinstance(error, HTTPException) and refusal.status in (404, 405):
            what = "no such path" if refusal.status == 404 else f"{request.method} is not answered"
            path = request.url.path
            refusal = RefusalError(f"{what}: {path}", refusal.status, kind=KINDS[refusal.status])
        return response_of(refusal, headers)

    for kind in (LorakitError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)

"""Requests that are refused: what was wrong, in words, and as a status of HTTP."""

from __future__ import annotations

from lorakit.errors import LorakitError

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
"""The type of an error by its status, in the words of OpenAI's clients and of vLLM."""


class RefusalError(LorakitError):
    """A request that the server refuses.

    Args:
        message: what was asked, what was found, what to do.
        status: of HTTP.
        param: the field that is wrong.
        kind: the error's type; None: the usual one of the status.
        retry_after_s: after how many seconds to ask again; None: not at all.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.kind = kind or KINDS.get(status, KINDS[400] if status < 500 else KINDS[500])
        self.retry_after_s = retry_after_s

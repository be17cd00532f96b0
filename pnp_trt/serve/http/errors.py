"""Errors in the format of each interface: one sentence, and the status code that client libraries expect."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from ...errors import BundleNotFound, Cancelled, InputError
from ...io.text import printable
from ..engine import Busy, Expired, Stopping

#: status codes of errors; client libraries retry 429 and 5xx automatically
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (Busy, 429), (Stopping, 503), (Expired, 504), (Cancelled, 409), (BundleNotFound, 404), (InputError, 400),
)  # fmt: skip
#: OpenAI's error types by status
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(InputError):
    """A request that is refused before it reaches an engine.

    Attributes:
        status: HTTP status code.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    if isinstance(error, Refused):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def reply(path: str, error: Exception) -> JSONResponse:
    """The error response in the format of the interface that ``path`` belongs to."""
    status = status_of(error)
    return as_json(path, status, printable(error, limit=2000), error)


def as_json(path: str, status: int, message: str, error: Exception | None = None) -> JSONResponse:
    """Same as :func:`reply`, for a message."""
    if path.startswith("/sdapi/"):
        name = type(error).__name__ if error is not None else "HTTPException"
        body: dict[str, Any] = {"error": name, "detail": message, "body": "", "errors": message}
    else:
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        code = {404: "not_found", 429: "queue_full"}.get(status)
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Stopping):
        headers["Retry-After"] = "5"
    return JSONResponse(body, status, headers)


def sentence(errors: list[Any]) -> str:
    """One sentence for the first of pydantic's errors."""
    first = errors[0] if errors else {"msg": "it cannot be read", "loc": ()}
    place = ".".join(str(part) for part in first.get("loc", ()) if part != "body") or "the body"
    others = len(errors) - 1
    more = f" ({others} more field{' is' if others == 1 else 's are'} wrong)" if others > 0 else ""
    return printable(f"{place}: {first.get('msg', 'wrong')}{more}; correct it and send it again", limit=500)

"""Checks before every request: its host, origin and key, and the size and speed of its body."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .errors import Refused, as_json
from .settings import BODY_SECONDS, MAX_BODIES, MAX_BODY, Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: paths that are served without a key, because they reveal nothing about the images
OPEN = ("/", "/healthz", "/readyz", "/favicon.ico")
OPEN_BELOW = ("/page/",)
_LOCAL = frozenset(("127.0.0.1", "localhost", "::1", "testserver"))


class Guard:
    """ASGI middleware that checks requests; see the module.

    Args:
        app: receives the accepted requests.
        body_seconds: time limit for receiving a body.
    """

    def __init__(self, app: App, settings: Settings, body_seconds: float = BODY_SECONDS) -> None:
        self._app, self._settings, self._seconds = app, settings, body_seconds
        self._buffered = 0  # bytes of all bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if (refusal := self._refusal(path, headers)) is not None:
            await as_json(path, *refusal)(scope, receive, send)
            return
        own_bytes = [0]
        try:
            try:
                body = await asyncio.wait_for(self._read(receive, own_bytes), self._seconds)
            except TimeoutError:
                await _close(
                    path, 408, f"the body did not arrive within {self._seconds:g} s; send it faster", scope, send
                )
                return
            except Refused as e:
                await _close(path, e.status, str(e), scope, send)
                return
            if body is None:
                return  # the client has gone
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._buffered -= own_bytes[0]

    async def _read(self, receive: Receive, own_bytes: list[int]) -> bytes | None:
        """Read the whole body; None if the client disconnected.

        Args:
            own_bytes: list of one number, to which this body's bytes in memory are added.
        """
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            own_bytes[0] += len(parts[-1])
            self._buffered += len(parts[-1])
            if own_bytes[0] > MAX_BODY:
                raise Refused(413, f"the body has more than {MAX_BODY >> 20} MiB; send less")
            if self._buffered > MAX_BODIES:
                raise Refused(503, "the server has too many large requests; try again later")
            if not message.get("more_body", False):
                return b"".join(parts)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and message for a refused request; None if it is accepted."""
        settings = self._settings
        host = _name(headers.get("host", ""))
        if settings.local and host not in _LOCAL:
            return 403, "the request names another host; this server listens on this machine alone: use 127.0.0.1"
        origin = headers.get("origin", "")
        if origin and (urlsplit(origin).hostname or "") != host:
            return 403, "a page of another site sent the request; use the server's own page, or another client"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > MAX_BODY:
            return 413, f"the body has more than {MAX_BODY >> 20} MiB; send less"
        if settings.api_key is None or path in OPEN or path.startswith(OPEN_BELOW):
            return None
        if not _has_key(headers.get("authorization", ""), settings.api_key):
            return 401, "the API key is missing or wrong; send it as a bearer token, or as a basic password"
        return None


def _name(host: str) -> str:
    """The host of a ``Host`` header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _has_key(authorization: str, key: str) -> bool:
    scheme, _, credential = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            credential = base64.b64decode(credential, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(credential.strip().encode(), key.encode())


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns a body that was already read, and then waits until the client disconnects."""
    sent = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _close(path: str, status: int, message: str, scope: Scope, send: Send) -> None:
    response = as_json(path, status, message)
    response.headers["Connection"] = "close"

    async def nothing() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    await response(scope, nothing, send)

"""The HTTP side in front of the replicas: each request goes to one of them, and its loss is answered with 503."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response

from ...errors import PnpError
from ..engine import Busy, Expired, Stopping
from ..http.errors import reply
from ..http.guard import Receive, Scope, Send
from ..http.metrics import Metrics
from .figures import merge
from .replica import Answer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

#: what a request is, of ASGI's scope; the rest belongs to the server that received it
_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
#: requests about jobs, which any replica may have: all are asked
_ALL = ("/v1/jobs", "/sdapi/v1/progress", "/sdapi/v1/interrupt", "/sdapi/v1/skip", "/readyz")
_ALL_POST = ("/sdapi/v1/options",)
#: seconds after a request's deadline, by which its replica has answered, and in which all replicas answer for a job
_GRACE, _ASK = 10.0, 20.0
#: seconds that a client is told to wait where every replica's queue is full
_RETRY = 5


class Lost(Stopping):
    """The replica that had the request has ended, or there is none; another takes it when it is sent again."""


class Front:
    """ASGI application in front of the replicas; it loads no engine.

    Args:
        handle: of the application that :func:`~pnp_trt.serve.ray.replica.application` gives.
        deadline: seconds after which a replica drops a request.
    """

    def __init__(self, handle: DeploymentHandle[Any], deadline: float) -> None:
        self._handle, self._deadline = handle, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        body: bytes = (await receive())["body"]  # whole: the guard has read it
        try:
            if path == "/healthz":
                response: Response = JSONResponse({"status": "ok"})
            elif path == "/metrics":
                response = Response(merge(await self._all("figures")), media_type=Metrics.content_type)
            else:
                plain = {name: scope[name] for name in _SCOPE if name in scope}
                everyone = path.startswith(_ALL) or (scope["method"] == "POST" and path in _ALL_POST)
                asked = self._best(path, plain, body) if everyone else self._one(plain, body, receive)
                answer = await asked
                if answer is None:
                    return  # the client has gone
                response = Response(answer.body, answer.status)
                response.raw_headers = answer.headers
        except Exception as error:
            response = reply(path, _as_ours(error))
        await response(scope, receive, send)

    async def _one(self, scope: dict[str, Any], body: bytes, receive: Receive) -> Answer | None:
        """Of the replica with the fewest requests; None, and the request is cancelled, where the client goes."""
        call = self._handle.respond.remote(scope, body)
        done = asyncio.ensure_future(_result(call))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((done, gone), timeout=self._deadline + _GRACE, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            if gone.done():
                return None
            raise Expired(f"no replica answered within {self._deadline:g} s; try again later, or start more --replicas")
        finally:
            gone.cancel()
            if not done.done():
                call.cancel()
                done.cancel()

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of every replica that gives one.

        Raises:
            Lost: if none does.
        """
        call = self._handle.broadcast(method, *arguments)
        results = await call.results_async(timeout_s=_ASK, return_exceptions=True)
        if good := [each for each in results if not isinstance(each, BaseException)]:
            return good
        raise Lost("no replica answers; try again in a few seconds")

    async def _best(self, path: str, scope: dict[str, Any], body: bytes) -> Answer:
        """Of the replica that has the job."""
        answers: list[Answer] = await self._all("respond", scope, body)
        return max(answers, key=lambda answer: _knows(path, answer))


async def _result(call: Awaitable[Answer]) -> Answer:
    return await call


def _knows(path: str, answer: Answer) -> tuple[bool, int]:
    """How much a replica's answer has of a job: whether it is no error, and the jobs of the client."""
    jobs = 0
    if path.startswith("/sdapi/v1/progress") and answer.status == 200:
        jobs = json.loads(answer.body)["state"]["job_count"]
    if path == "/v1/jobs" and answer.status == 200:
        jobs = len(json.loads(answer.body)["jobs"])
    return answer.status < 400, jobs


def _as_ours(error: Exception) -> Exception:
    """An error of Ray's as the interfaces state it."""
    from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, RayServeException

    if isinstance(error, PnpError):
        return error
    if isinstance(error, BackPressureError):
        return Busy("every replica's queue is full; try again later", _RETRY)
    if isinstance(error, RayTaskError) and not isinstance(getattr(error, "cause", None), RayActorError):
        return PnpError(f"unexpected {type(error.cause).__name__}; the server's logs have the details")
    if isinstance(error, ActorUnavailableError):
        return Lost("the replica that had the request does not answer; try again")
    if isinstance(error, RayError | RayServeException | TimeoutError):
        return Lost("the replica that had the request has ended; try again")
    return PnpError(f"unexpected {type(error).__name__}; the server's logs have the details")

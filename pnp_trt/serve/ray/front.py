"""The HTTP side in front of the replicas: sends each request to a replica, and answers 503 if that replica is lost."""

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

#: keys of ASGI's scope that describe the request; the others belong to the server that received it
_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
#: paths of requests that are sent to all replicas, because any of them may have the job
_ALL = ("/v1/jobs", "/sdapi/v1/progress", "/sdapi/v1/interrupt", "/sdapi/v1/skip", "/readyz")
_ALL_POST = ("/sdapi/v1/options",)
#: seconds after a request's deadline until its replica counts as lost; seconds for all replicas to answer
_GRACE, _ASK = 10.0, 20.0
#: Retry-After, in seconds, when every replica's queue is full
_RETRY = 5


class Lost(Stopping):
    """The replica that had the request has ended, or there is none; the request can be sent again."""


class Front:
    """ASGI application in front of the replicas; it loads no engine.

    Args:
        handle: handle of the application from :func:`~pnp_trt.serve.ray.replica.application`.
        deadline: seconds after which a replica drops a request.
    """

    def __init__(self, handle: DeploymentHandle[Any], deadline: float) -> None:
        self._handle, self._deadline = handle, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        body: bytes = (await receive())["body"]  # complete, because the guard has read it
        try:
            if path == "/healthz":
                response: Response = JSONResponse({"status": "ok"})
            elif path == "/metrics":
                response = Response(merge(await self._all("figures")), media_type=Metrics.content_type)
            else:
                plain = {name: scope[name] for name in _SCOPE if name in scope}
                broadcast = path.startswith(_ALL) or (scope["method"] == "POST" and path in _ALL_POST)
                pending = self._best(path, plain, body) if broadcast else self._one(plain, body, receive)
                answer = await pending
                if answer is None:
                    return  # the client disconnected
                response = Response(answer.body, answer.status)
                response.raw_headers = answer.headers
        except Exception as error:
            response = reply(path, _as_ours(error))
        await response(scope, receive, send)

    async def _one(self, scope: dict[str, Any], body: bytes, receive: Receive) -> Answer | None:
        """The answer of the least busy replica; None if the client disconnects, which cancels the request."""
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
        """The results of a method from every replica that answers.

        Raises:
            Lost: if none answers.
        """
        call = self._handle.broadcast(method, *arguments)
        results = await call.results_async(timeout_s=_ASK, return_exceptions=True)
        if answers := [result for result in results if not isinstance(result, BaseException)]:
            return answers
        raise Lost("no replica answers; try again in a few seconds")

    async def _best(self, path: str, scope: dict[str, Any], body: bytes) -> Answer:
        """The answer of the replica that has the job."""
        answers: list[Answer] = await self._all("respond", scope, body)
        return max(answers, key=lambda answer: _informative(path, answer))


async def _result(call: Awaitable[Answer]) -> Answer:
    return await call


def _informative(path: str, answer: Answer) -> tuple[bool, int]:
    """Rank of a replica's answer about a job: whether it is not an error, and its number of the client's jobs."""
    jobs = 0
    if path.startswith("/sdapi/v1/progress") and answer.status == 200:
        jobs = json.loads(answer.body)["state"]["job_count"]
    if path == "/v1/jobs" and answer.status == 200:
        jobs = len(json.loads(answer.body)["jobs"])
    return answer.status < 400, jobs


def _as_ours(error: Exception) -> Exception:
    """An error of this package for one of Ray's."""
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

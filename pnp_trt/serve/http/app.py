"""The application: engines with their interfaces, health, metrics and the page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ...errors import InputError, PnpError
from ...io.inputs import excerpt
from ...io.text import printable
from ...version import __version__
from ..engine import Engine
from ..loras import LoraEngines
from . import a1111, jobs, openai
from .errors import as_json, reply, sentence
from .guard import Guard
from .metrics import Metrics
from .service import Service
from .settings import APIS, Settings

_ROUTERS = {"openai": openai.router, "a1111": a1111.router}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: loads nothing from other origins, and runs only the page's own script
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create(
    engines: Mapping[str, Engine], metrics: Metrics, settings: Settings | None = None, loras: LoraEngines | None = None
) -> FastAPI:
    """The application for running engines; on shutdown, they complete their requests and stop.

    Long: routes, handlers and the lifespan are closures over the service.

    Args:
        engines: by name, at least one.
        metrics: those that the engines' watchers update.
        loras: engines with LoRAs; None offers none.

    Raises:
        InputError: without an engine, or for an unknown interface.
    """
    settings = settings or Settings()
    if not engines:
        raise InputError("no engine was named; name one or more")
    if unknown := [api for api in settings.apis if api not in APIS]:
        raise InputError(f"the interface is '{unknown[0]}'; known: {', '.join(APIS)}")
    service = Service(dict(engines), metrics, settings, loras)
    for name, engine in engines.items():
        metrics.of(name, partial(_with_loras, engine, loras), None if loras is None else partial(loras.loading, name))

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        if loras is not None:
            await asyncio.to_thread(loras.stop)
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in engines.values()))

    app = FastAPI(title="pnp-trt", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, settings=settings)

    @app.exception_handler(PnpError)
    async def _(request: Request, error: PnpError) -> Response:
        return reply(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "") if request.method == "POST" else "application/json"
        message = _not_json(kind) or sentence(list(error.errors()))
        return as_json(request.url.path, 422 if request.url.path.startswith("/sdapi/") else 400, message)

    @app.exception_handler(ValidationError)
    async def _(request: Request, error: ValidationError) -> Response:
        return as_json(request.url.path, 400, sentence(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        detail = printable(str(error.detail), limit=500)
        messages = {404: "there is nothing at this address; see the documentation of the interface",
                 405: "this address takes another method; see the documentation of the interface"}  # fmt: skip
        return as_json(request.url.path, error.status_code, messages.get(error.status_code, detail))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return as_json(request.url.path, 500, f"unexpected {type(error).__name__}; the server's output has the details")

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        """Whether every engine takes requests."""
        dead = [name for name, engine in engines.items() if not engine.alive]
        body: dict[str, Any] = {"status": "stopping" if dead else "ready", "engines": list(engines)}
        if loras is not None:
            body["lora_requests_waiting"] = sum(loras.loading(name) for name in engines)
        return JSONResponse(body, 503 if dead else 200)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/")
    async def page() -> Response:
        if "openai" not in settings.apis:  # which the page uses
            raise HTTPException(404)
        return _file("index.html")

    @app.get("/page/{name}")
    async def part(name: str) -> Response:
        return _file(name)

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return _file("icon.svg")

    app.include_router(jobs.router(service))
    for api in settings.apis:
        app.include_router(_ROUTERS[api](service))
    return app


def _not_json(kind: str) -> str | None:
    """The message for a body whose content type is not JSON; None if it is JSON."""
    kind = kind.partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        return None
    sent = f"as {excerpt(kind)}" if kind else "without a type"
    return f"the body was sent {sent}; send JSON, with the header Content-Type: application/json"


def _with_loras(engine: Engine, loras: LoraEngines | None) -> list[Engine]:
    """An engine and the engines of the same bundle with LoRAs."""
    others = () if loras is None else loras.engines()
    return [engine, *(other for name, other in others if name == engine.pipeline.name)]


def _file(name: str) -> Response:
    """A file of the page, which must be one of those in the package."""
    folder = resources.files(__package__) / "page"
    match = next((file for file in folder.iterdir() if file.name == name), None)
    suffix = name[name.rfind(".") :]
    if match is None or suffix not in _TYPES:
        raise HTTPException(404)
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(match.read_bytes(), media_type=_TYPES[suffix], headers=headers)

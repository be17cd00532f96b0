"""Requests that wait or run, by the id that their client gave them: progress, a preview, cancelling."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from ...runtime.pipeline import GeneratedImage
from ...sampling.schedules import SCHEDULES
from ..engine import Engine, Job
from .service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1")

    async def told(engine: Engine, job: Job, preview: bool) -> dict[str, Any]:
        found = job.progress()
        held: dict[str, Any] = {
            "id": job.id, "steps_done": found.steps_done, "steps": found.steps, "running": found.running > 0,
            "state": service.state(job),
            "seconds": round(found.seconds, 3), "seconds_left": None if found.left is None else round(found.left, 3),
            "preview": None,
        }  # fmt: skip
        if preview and (pixels := await asyncio.wrap_future(engine.preview(job))) is not None:
            (data,) = await service.files([GeneratedImage(pixels, {})], "webp")
            held["preview"] = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        return held

    @routes.get("/jobs/{name}")
    async def progress(name: str, preview: bool = False) -> dict[str, Any]:
        return await told(*service.job(name), preview)

    @routes.get("/jobs")
    async def listed(id: str, preview: bool = False) -> dict[str, Any]:
        """As above for one that may have ended, or not have come yet: a list, which is empty then."""
        found = service.job_or_none(id)
        return {"jobs": [] if found is None else [await told(*found, preview)]}

    @routes.delete("/jobs/{name}", status_code=204)
    async def cancel(name: str) -> Response:
        service.cancel(service.job(name)[1])
        return Response(status_code=204)

    @routes.get("/engines")
    async def engines() -> dict[str, Any]:
        """What the page offers: each engine's methods, size and limits."""
        return {
            "engines": [
                {
                    "name": name, "methods": list(engine.pipeline.step_methods), "size": list(engine.pipeline.size),
                    "schedule": engine.pipeline.default_schedule, "steps": engine.pipeline.sampling_steps,
                    "negative_prompts": engine.pipeline.negative_prompts, "slots": engine.slots,
                    "waiting": engine.waiting,
                }
                for name, engine in service.engines.items()
            ],
            "schedules": list(SCHEDULES),
            "loras": [] if service.loras is None else list(service.loras.files),
        }  # fmt: skip

    return routes

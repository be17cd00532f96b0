"""Waiting and running requests by the id that the client chose: progress, preview and cancelling."""

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

    async def describe(engine: Engine, job: Job, preview: bool) -> dict[str, Any]:
        current = job.progress()
        answer: dict[str, Any] = {
            "id": job.id, "steps_done": current.steps_done, "steps": current.steps, "running": current.running > 0,
            "state": service.state(job), "seconds": round(current.seconds, 3),
            "seconds_left": None if current.left is None else round(current.left, 3), "preview": None,
        }  # fmt: skip
        if preview and (pixels := await asyncio.wrap_future(engine.preview(job))) is not None:
            (data,) = await service.files([GeneratedImage(pixels, {})], "webp")
            answer["preview"] = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        return answer

    @routes.get("/jobs/{name}")
    async def progress(name: str, preview: bool = False) -> dict[str, Any]:
        return await describe(*service.job(name), preview)

    @routes.get("/jobs")
    async def listed(id: str, preview: bool = False) -> dict[str, Any]:
        """The same for a request that may have ended or not have arrived yet: a list, which is then empty."""
        current = service.job_or_none(id)
        return {"jobs": [] if current is None else [await describe(*current, preview)]}

    @routes.delete("/jobs/{name}", status_code=204)
    async def cancel(name: str) -> Response:
        service.cancel(service.job(name)[1])
        return Response(status_code=204)

    @routes.get("/engines")
    async def engines() -> dict[str, Any]:
        """Data for the page: each engine's methods, size and limits."""
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

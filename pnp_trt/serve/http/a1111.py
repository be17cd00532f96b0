"""The part of the Stable Diffusion web UI's (A1111) interface, ``/sdapi/v1``, that front-ends use."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ...errors import Cancelled, InputError
from ...runtime.a1111 import CHUNK, parse_parameters, read_text, text_of
from ...runtime.pipeline import GeneratedImage
from ...runtime.prompt_syntax import A1111, lora_tags, take_lora_tags
from ...sampling.schedules import SCHEDULES, SPACINGS, a1111_names, from_a1111
from ...sampling.schedules.spacing import OWN_SPACING
from .service import GenerationRequest, Service, address_of, from_base64, ignored
from .settings import MAX_BODY, MAX_IMAGES, MAX_PROMPT, MAX_TEXT

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Base64 = Annotated[str, StringConstraints(max_length=MAX_BODY)]
#: defaults of the web UI
CFG_SCALE, DENOISING = 7.0, 0.75
#: maximum number of addresses whose chosen model is stored
MAX_CLIENTS = 1000
#: fields of unsupported features that would change an image: refused if set, never silently ignored
_REFUSED = ("enable_hr", "restore_faces", "tiling", "script_name", "mask", "refiner_checkpoint", "subseed_strength")


class Txt2Img(BaseModel):
    """Fields of a request; other fields have no effect, and the answer's ``info`` lists them."""

    model_config = ConfigDict(extra="allow")

    prompt: Prompt = ""
    negative_prompt: Prompt | None = None
    seed: int | None = -1
    steps: int | None = None
    cfg_scale: Number | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: Text | None = None
    sampler_index: Text | None = None
    scheduler: Text | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    override_settings: Annotated[dict[Text, Any], Field(max_length=100)] | None = None
    send_images: bool = True
    force_task_id: Text | None = None
    enable_hr: bool | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    script_name: Text | None = None
    refiner_checkpoint: Text | None = None
    subseed_strength: Number | None = None
    mask: Base64 | None = None
    method: Text | None = None


class Img2Img(Txt2Img):
    """The same, with an initial image."""

    init_images: Annotated[list[Base64], Field(max_length=MAX_IMAGES)] = []
    denoising_strength: Number | None = None


class Options(BaseModel):
    """Settings of the web UI; only the model is applied."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: Text | None = None


class PngInfo(BaseModel):
    """An image whose parameters are requested."""

    image: Base64


def router(service: Service) -> APIRouter:
    """The routes.

    Long: each route is a closure over ``service``, and FastAPI reads the request's fields from the route's signature.
    """
    routes = APIRouter(prefix="/sdapi/v1")
    chosen: dict[str, str] = {}  # model that was set in the options, by client address

    def name_of(checkpoint: str | None) -> str | None:
        """The engine's name in a checkpoint's title, such as ``emoji-tiny [0123456789]``."""
        return None if not checkpoint else checkpoint.partition(" [")[0].strip()

    async def generate(request: Request, body: Txt2Img, init: str | None, strength: float | None) -> dict[str, Any]:
        for field in _REFUSED:
            if getattr(body, field):
                raise InputError(f"{field} is set and not offered here; leave it out")
        count = body.batch_size * body.n_iter
        if count > MAX_IMAGES:
            raise InputError(f"batch_size times n_iter is {count}; at most {MAX_IMAGES} images are taken at once")
        if (body.width is None) != (body.height is None):
            raise InputError("one of width and height is missing; give both, or none for the engine's own size")
        settings = dict(body.override_settings or {})
        override = settings.pop("sd_model_checkpoint", None)
        engine = name_of(str(override) if override else chosen.get(address_of(request)))
        sampler = (body.sampler_name or body.sampler_index or "").strip()
        prompt, loras = take_lora_tags(body.prompt)
        order = GenerationRequest(
            prompt, engine, count, (body.negative_prompt or "").strip() or None, body.steps,
            CFG_SCALE if body.cfg_scale is None else body.cfg_scale,
            None if body.seed is None or body.seed < 0 else body.seed, body.method,
            from_a1111(sampler, body.scheduler) if sampler else None,
            None if body.height is None or body.width is None else (body.height, body.width),
            None if init is None else await service.pixels(from_base64(init, "init_images[0]"), "init_images[0]"),
            strength, syntax=A1111, loras=loras,
        )  # fmt: skip
        job = await service.submit(request, "a1111", order)
        try:
            images = await service.wait(request, job)
        except Cancelled:
            if job.partial is None:
                raise
            images = [job.partial]  # like the web UI, answer with the unfinished image
        files = await service.files(images, "png") if body.send_images else []
        parameters = [image.parameters for image in images]
        first = parameters[0]
        height, width = images[0].pixels.shape[:2]
        texts = [text_of(each) or "" for each in parameters]
        info: dict[str, Any] = {
            "prompt": first["prompt"], "all_prompts": [p["prompt"] for p in parameters],
            "negative_prompt": first.get("negative", ""),
            "all_negative_prompts": [p.get("negative", "") for p in parameters],
            "seed": first["seed"], "all_seeds": [p["seed"] for p in parameters], "subseed": -1, "subseed_strength": 0,
            "width": width, "height": height, "sampler_name": a1111_names(first["schedule"])[0],
            "cfg_scale": first["guidance"], "steps": first["steps"], "batch_size": body.batch_size,
            "restore_faces": False, "sd_model_name": first["engine"], "denoising_strength": first.get("strength"),
            "infotexts": texts, "index_of_first_image": 0, "method": first["method"],
            "ignored": ignored({*(body.model_extra or ()), *settings}),
            **{key: first[key] for key in ("dropped", "negative_dropped") if key in first},
        }  # fmt: skip
        echoed = body.model_dump(exclude={"init_images", "mask", *(body.model_extra or ())})
        return {
            "images": [base64.b64encode(data).decode() for data in files],
            "parameters": echoed,
            "info": json.dumps(info),
        }

    @routes.post("/txt2img")
    async def txt2img(request: Request, body: Txt2Img) -> dict[str, Any]:
        return await generate(request, body, None, None)

    @routes.post("/img2img")
    async def img2img(request: Request, body: Img2Img) -> dict[str, Any]:
        if len(body.init_images) != 1:
            raise InputError(f"{len(body.init_images)} init_images were sent; send one")
        strength = DENOISING if body.denoising_strength is None else body.denoising_strength
        return await generate(request, body, body.init_images[0], strength)

    @routes.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """Progress of the oldest request from the same address; this interface has no other identifier."""
        jobs = service.jobs_of("a1111", request)
        state: dict[str, Any] = {
            "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": len(jobs),
            "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
        }  # fmt: skip
        answer: dict[str, Any] = {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": state,
            "current_image": None,
            "textinfo": None,
        }
        if not jobs:
            return answer
        engine, job = jobs[0]
        details = job.progress()
        if service.state(job) == "loading":
            answer["textinfo"] = f"loading {lora_tags(job.prepared.loras)}"
        answer["progress"] = details.steps_done / max(1, details.steps)
        answer["eta_relative"] = details.left or 0.0
        state |= {
            "job": job.id,
            "sampling_step": details.steps_done // job.count,
            "sampling_steps": len(job.prepared.table),
        }
        if not skip_current_image and (pixels := await asyncio.wrap_future(engine.preview(job))) is not None:
            (data,) = await service.files([GeneratedImage(pixels, {})], "png")
            answer["current_image"] = base64.b64encode(data).decode()
        return answer

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt(request: Request) -> dict[str, Any]:
        """End all requests from the same address; each is answered with its unfinished image."""
        for engine, job in service.jobs_of("a1111", request):
            if (pixels := await asyncio.wrap_future(engine.preview(job))) is not None:
                parameters = job.prepared.parameters(0) | {"interrupted_after": job.progress().steps_done // job.count}
                job.partial = GeneratedImage(pixels, parameters)
            service.cancel(job)
        return {}

    @routes.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        details = []
        for name, rule in SCHEDULES.items():
            aliases = rule.aliases or (name,)
            details.append({"name": aliases[0], "aliases": [*aliases[1:], name], "options": {}})
        return details

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        named = {name: (spacing.aliases or (name,))[0] for name, spacing in SPACINGS.items()}
        return [
            {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
            for name, label in {"automatic": OWN_SPACING[0], **named}.items()
        ]

    @routes.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        details = []
        for name, engine in service.engines.items():
            digest = engine.pipeline.base
            details.append(
                {"title": f"{name} [{digest[:10]}]", "model_name": name, "hash": digest[:10], "sha256": digest,
                 "filename": name, "config": None}
            )  # fmt: skip
        return details

    @routes.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """LoRAs that a prompt may name; paths are not revealed."""
        names = () if service.loras is None else service.loras.files
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]

    @routes.get("/sd-vae")
    @routes.get("/upscalers")
    @routes.get("/hypernetworks")
    @routes.get("/prompt-styles")
    @routes.get("/latent-upscale-modes")
    @routes.get("/face-restorers")
    @routes.get("/realesrgan-models")
    @routes.get("/script-info")
    @routes.get("/extensions")
    async def none() -> list[dict[str, Any]]:
        """Empty lists, because front-ends request them at start."""
        return []

    @routes.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        return {"loaded": {}, "skipped": {}}

    @routes.get("/scripts")
    async def scripts() -> dict[str, Any]:
        return {"txt2img": [], "img2img": []}

    @routes.get("/cmd-flags")
    @routes.post("/refresh-checkpoints")
    @routes.post("/refresh-loras")
    @routes.post("/refresh-vae")
    async def nothing() -> dict[str, Any]:
        """There are no flags, and the lists do not change while the server runs."""
        return {}

    @routes.get("/options")
    async def options(request: Request) -> dict[str, Any]:
        name = chosen.get(address_of(request)) or next(iter(service.engines))
        return {"sd_model_checkpoint": name, "samples_format": "png"}

    @routes.post("/options")
    async def set_options(request: Request, body: Options) -> dict[str, Any]:
        """Set the model for later requests from the same address; other settings are ignored."""
        if (name := name_of(body.sd_model_checkpoint)) is not None:
            service.engine(name)
            if len(chosen) >= MAX_CLIENTS:
                chosen.clear()
            chosen[address_of(request)] = name
        return {}

    @routes.post("/png-info")
    async def png_info(body: PngInfo) -> dict[str, Any]:
        data = from_base64(body.image, "image")
        await service.pixels(data, "image")  # refuses anything that is not an image, or is too large
        text = await asyncio.to_thread(read_text, data)
        return {"info": text, "items": {CHUNK: text} if text else {}, "parameters": parse_parameters(text)}

    return routes

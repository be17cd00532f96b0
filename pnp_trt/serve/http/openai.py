"""OpenAI's images interface: ``/v1/images/generations``, ``/v1/images/edits``, ``/v1/models``.

OpenAI has no fields for steps, seed and guidance scale; they have the names that other servers use.
"""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from ...bundle.profiles import Size
from ...errors import InputError
from ...io.inputs import excerpt
from ...runtime.prompt_syntax import PLAIN
from .service import GenerationRequest, Service, ignored
from .settings import MAX_IMAGES, MAX_PROMPT, MAX_TEXT

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT)]
#: request id that a client may choose, to query the request's progress or to cancel it
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
#: OpenAI's values for the model's default size
_OWN = ("", "auto")


class LoraOf(BaseModel):
    """A LoRA in a request."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class ImagesRequest(BaseModel):
    """The body of both routes; other fields (quality, style, user, …) have no effect, and the answer lists them."""

    model_config = ConfigDict(extra="allow")

    prompt: Prompt
    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    size: Text | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] = "png"
    stream: bool | None = None
    num_inference_steps: int | None = None
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seed: int | None = None
    negative_prompt: Prompt | None = None
    method: Text | None = None
    prompt_syntax: Text | None = None
    schedule: Text | None = None
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None
    request_id: Name | None = None
    lora: list[LoraOf] | None = None

    @field_validator("n", "output_format", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        """Replace null, which OpenAI's clients send, by the default."""
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("lora", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Accept a single LoRA instead of a list, and a name instead of a LoRA at scale 1."""
        each = value if isinstance(value, list) else [] if value is None else [value]
        return [{"name": one} if isinstance(one, str) else one for one in each]


def parse(size: str | None) -> Size | None:
    """Height and width of OpenAI's WIDTHxHEIGHT; None for the engine's own size.

    Raises:
        InputError: if it has another format.
    """
    if size is None or size in _OWN:
        return None
    width, x, height = size.partition("x")
    if not (x and width.isascii() and height.isascii() and width.isdigit() and height.isdigit() and len(size) < 12):
        raise InputError(f"size is {excerpt(size)}; write WIDTHxHEIGHT in pixels, or auto")
    return int(height), int(width)


def router(service: Service) -> APIRouter:
    """The routes.

    Long: each route is a closure over ``service``, and FastAPI reads the request's fields from the route's signature.
    """
    routes = APIRouter(prefix="/v1")

    async def generate(request: Request, body: ImagesRequest, init: bytes | None = None) -> dict[str, Any]:
        if body.stream:
            raise InputError("stream is true; this server does not stream images: leave it out")
        order = GenerationRequest(
            body.prompt, body.model, body.n, body.negative_prompt, body.num_inference_steps, body.guidance_scale,
            body.seed, body.method, body.schedule, parse(body.size),
            None if init is None else await service.pixels(init, "image"), body.strength,
            body.prompt_syntax or PLAIN, body.request_id,
            tuple((lora.name, lora.scale) for lora in body.lora or ()),
        )  # fmt: skip
        job = await service.submit(request, "openai", order)
        images = await service.wait(request, job)
        files = [base64.b64encode(data).decode() for data in await service.files(images, body.output_format)]
        url = body.response_format == "url"  # nothing is stored, so the URL contains the image itself
        height, width = job.prepared.size
        return {
            "created": int(time.time()),
            "data": [
                {"url": f"data:image/{body.output_format};base64,{data}"} if url else {"b64_json": data}
                for data in files
            ],
            "output_format": body.output_format,
            "size": f"{width}x{height}",
            "pnp_trt": {
                "id": job.id,
                "images": [image.parameters for image in images],
                "evaluations": job.evaluations,
                "seconds": round((job.ended or job.submitted) - job.submitted, 3),
                "waited": round((job.admitted or job.submitted) - job.submitted, 3),
                "ignored": ignored(body.model_extra or ()),
            },
        }

    @routes.post("/images/generations")
    async def generations(request: Request, body: ImagesRequest) -> dict[str, Any]:
        return await generate(request, body)

    @routes.post("/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        """A form, as OpenAI's clients send it, with the initial image."""
        async with request.form(max_files=2, max_fields=32, max_part_size=1 << 20) as form:
            files = {name: value for name, value in form.multi_items() if not isinstance(value, str)}
            image = next((files[name] for name in ("image", "image[]") if name in files), None)
            if "mask" in files:
                raise InputError("a mask was sent; inpainting is not offered: leave it out")
            if image is None:
                raise InputError("no file named image was sent; send the initial image")
            data = await image.read()
            fields: dict[str, Any] = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        # OpenAI's client library flattens an object into such fields
        lora = {key: fields.pop(f"lora[{key}]") for key in ("name", "scale") if f"lora[{key}]" in fields}
        return await generate(request, ImagesRequest.model_validate(fields | ({"lora": lora} if lora else {})), data)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "pnp-trt"} for name in service.engines],
        }

    return routes

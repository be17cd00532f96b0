"""Peers, other toolkits timed under the same rules: diffusers, eager and compiled, and optimum-onnx.

A peer does the work of the teacher's CFG engine (same prompts, noise, steps, scale, schedule and number of threads),
with one batch of two per step, through its own pipeline's `__call__`, which gets text states and latents and returns
latents. Text encoder and decoder are called separately, and the empty prompt is encoded once and cached, as in engines.
Times exclude compiling and exporting. Heavy packages are imported only when `load` is called.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, PnpError
from ...runtime.text import Text
from ...sampling.schedules import chosen, evaluations, resolve
from ...version import installed
from .cases import Case

EAGER, COMPILED, OPTIMUM = "diffusers", "diffusers-compile", "optimum-onnx"
KINDS = (EAGER, COMPILED, OPTIMUM)
#: the U-Net's input name for SDXL's pooled text
_POOLED = "text_embeds"


def available(
    base: str,
    *,
    kinds: Sequence[str] = KINDS,
    provider: str = "cpu",
    precision: str = "fp32",
    weights: str | None = None,
) -> tuple[list[Case], list[dict[str, str]]]:
    """Return the peers that can run `base` here, loaded, as cases; and those left out, `{"what", "why"}`.

    base: name of a base model with files.  kinds: the requested peers.  provider: "cpu", "cuda", or "auto" for a GPU if
    PyTorch finds one.  precision: of U-Net and text encoder, "fp32", "fp16" or "bf16"; use that of the engines, or
    "fp32" on a CPU.  weights: the engines' `base`; if the base's files differ from it (LoRAs merged into the engines,
    or files changed since), all peers are left out.

    Raises InputError for an unknown kind or base.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"peer is '{kind}'; known: {', '.join(KINDS)}")
    cases: list[Case] = []
    left_out: list[dict[str, str]] = []
    for kind in kinds:
        why = _cannot(kind, base, provider, weights)
        if why is None:
            try:
                cases.append(Case(load(kind, base, provider=provider, precision=precision), kind))
                continue
            except InputError:
                raise
            except Exception as e:  # a peer's own code: its failure must not end our measurement
                why = f"it could not be loaded ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"
        left_out.append({"what": kind, "why": why})
    return cases, left_out


def load(kind: str, base: str, *, provider: str = "cpu", precision: str = "fp32") -> Peer:
    """Load one peer of `KINDS`; arguments as for `available`.

    Raises InputError for an unknown base, PnpError for "cuda" if PyTorch finds no GPU, and whatever the peer raises.
    """
    import torch

    from ...models.bases import resolve
    from ...models.networks import quiet_libraries

    quiet_libraries()
    if provider == "cuda" and not torch.cuda.is_available():
        raise PnpError("provider 'cuda' was requested, but PyTorch finds no GPU; use --provider cpu")
    device = "cuda" if provider != "cpu" and torch.cuda.is_available() else "cpu"
    model = resolve(base)
    arguments = {"kind": kind, "base": base, "provider": provider, "precision": precision}
    if kind == OPTIMUM:
        pipe = _optimum(model.folder, device)
        weights = sum(f.stat().st_size for f in (model.folder / "unet").glob("*.safetensors"))
    else:
        pipe = _diffusers(model, device, precision)
        weights = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
        if kind == COMPILED:
            config: Any = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, 64)  # every batch size is compiled separately
            pipe.unet = torch.compile(pipe.unet, fullgraph=True, dynamic=False)
    return Peer(kind, base, pipe, model, device, weights, arguments)


class Peer:
    """Another library's Stable Diffusion pipeline as a `cases.TimedPipeline`; it supports CFG only.

    Attributes:
        name: the base model's name.
        base: identifies the teacher's weights, as the engines' `base` does.
        methods: its own kind.
        size: height and width in pixels.
        on_gpu: whether it runs on a GPU.
        weight_bytes: of the U-Net.
        peer: the arguments of `load` that recreate it in another process.
    """

    def __init__(
        self, kind: str, base: str, pipe: Any, model: Any, device: str, weight_bytes: int, peer: dict[str, Any]
    ) -> None:
        self.name = Path(base).resolve().name if Path(base).is_dir() else base
        self.base: str = model.fingerprint()["all"]
        self.methods: tuple[str, ...] = (kind,)
        sizes = model.sizes()
        self._latent = sizes.latent
        self._factor = sizes.factor
        self.size = (sizes.latent[1] * sizes.factor, sizes.latent[2] * sizes.factor)
        self.on_gpu = device == "cuda"
        self.weight_bytes = weight_bytes
        self.peer = peer
        self._pipe, self._device = pipe, device
        self._config = model.scheduler_config() | {"_class_name": model.scheduler_class()}
        self._empty: Text | None = None
        self._zeros = model.zero_empty_prompt()

    def encode(self, prompts: list[str]) -> Text:
        """Return text states, [N, tokens, D] float32, and SDXL's pooled text."""
        import torch

        with torch.inference_mode():
            states, _, *pooled = self._pipe.encode_prompt(
                prompts, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        added = {_POOLED: pooled[0].float().cpu().numpy()} if pooled else {}
        return Text(states.float().cpu().numpy(), added)

    def noise(self, seeds: list[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Return starting latents, [N, C, h, w] float32, bit for bit those of the engines."""
        channels, *own = self._latent
        shape = own if size is None else [side // self._factor for side in size]
        return np.stack(
            [np.random.Generator(np.random.Philox(s)).standard_normal((channels, *shape), np.float32) for s in seeds]
        )

    def evaluations(self, steps: int, schedule: str | None = None) -> int:
        """Return the model evaluations of a loop of `steps`, counting CFG's two as one, as engines do."""
        return evaluations(schedule, self._config, steps)

    def denoise(
        self,
        context: Text | np.ndarray,
        noise: np.ndarray,
        *,
        steps: int,
        guidance: np.ndarray | float,
        method: str,
        schedule: str | None = None,
    ) -> np.ndarray:
        """Run the pipeline's own loop and return the final latents, [N, C, h, w] float32.

        Raises InputError for an unknown schedule, another method, or a scale at which the pipeline would not guide.
        """
        import diffusers
        import torch

        if method not in self.methods:
            raise InputError(f"peer '{self.methods[0]}' cannot do '{method}'")
        scale = np.unique(np.asarray(guidance, np.float64))
        if len(scale) != 1 or scale[0] <= 1:
            raise InputError(f"guidance is {guidance}; {self.methods[0]} takes one scale above 1 for all images")
        rule, config = chosen(resolve(schedule, self._config), self._config)
        if rule.diffusers_class is None:
            raise InputError(f"diffusers has no scheduler that equals '{rule.name}'; use ddim")
        self._pipe.scheduler = getattr(diffusers, rule.diffusers_class).from_config(config)
        text = Text.of(context)
        if self._empty is None:
            empty = self.encode([""])
            self._empty = empty.zeros() if self._zeros else empty
        dtype = self._pipe.unet.dtype
        embeddings: dict[str, Any] = {}
        for prefix, encoded in (("", text), ("negative_", self._empty.repeated(len(text)))):
            arrays = {"prompt_embeds": encoded.states}
            arrays |= {"pooled_prompt_embeds": encoded.added[_POOLED]} if _POOLED in encoded.added else {}
            embeddings |= {
                f"{prefix}{n}": torch.from_numpy(np.array(a)).to(self._device, dtype) for n, a in arrays.items()
            }
        height, width = (side * self._factor for side in noise.shape[-2:])
        latents = self._pipe(
            **embeddings,
            latents=torch.from_numpy(noise).to(self._device, dtype),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=float(scale[0]),
            output_type="latent",
        ).images
        return np.asarray(latents.float().cpu().numpy() if isinstance(latents, torch.Tensor) else latents, np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Return images, [N, H, W, 3] uint8."""
        import torch

        from ...models.latents import to_vae

        with torch.inference_mode():
            scaled = to_vae(torch.from_numpy(latents).to(self._device), self._pipe.vae)
            pixels = self._pipe.vae.decode(scaled, return_dict=False)[0]
            images = self._pipe.image_processor.postprocess(pixels, output_type="np")
        return np.asarray(np.rint(images * 255).astype(np.uint8))


def _diffusers(model: Any, device: str, precision: str) -> Any:
    """Load diffusers' pipeline of a base model; the decoder stays in float32, in which it cannot overflow."""
    import diffusers
    import torch

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in kinds:
        raise InputError(f"precision is '{precision}'; peers run in {', '.join(kinds)}")
    parts: dict[str, Any] = {}
    for spec, (tokenizer, encoder) in zip(model.text_specs, model.text_encoders(), strict=True):
        parts |= {spec.tokenizer: tokenizer, spec.name: encoder.to(device, kinds[precision])}
    if model.family == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, model.pipeline)(
        vae=model.vae().float().to(device),
        unet=model.unet().to(device, kinds[precision]),
        scheduler=diffusers.DDIMScheduler.from_config(model.scheduler_config()),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _optimum(folder: Path, device: str) -> Any:
    """Load and export optimum-onnx's pipeline.

    Tried with optimum-onnx 0.1.0, transformers 4.57.6 and diffusers 0.35.2 on a random Stable Diffusion of a few
    hundred thousand weights: its images equalled those of diffusers to within one level of 255.
    """
    module = importlib.import_module("optimum.onnxruntime")
    pipe = module.ORTStableDiffusionPipeline.from_pretrained(
        str(folder),  # given a Path, it cannot determine the library
        export=True,
        provider="CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider",
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cannot(kind: str, base: str, provider: str, weights: str | None) -> str | None:
    """Return why a peer cannot run a base here; None if it can."""
    if base.startswith("random:"):
        return f"base '{base}' has no files for it to load"
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        return "it needs torch and diffusers; install with: pip install 'pnp-trt[build]'"
    from ...models.bases import resolve

    model = resolve(base)
    if weights is not None and model.fingerprint()["all"] != weights:
        return f"the weights of base '{base}' are not those in the engines (LoRAs merged, or files changed since)"
    index = model.folder / "model_index.json"
    named = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None
    if named not in (None, model.pipeline):
        return f"base '{base}' is a {named}; peers run {model.pipeline}"
    if kind == COMPILED and provider == "cpu" and sys.platform != "win32" and not _compiler():
        return "torch.compile on a CPU needs a C++ compiler, but none was found; install g++"
    if kind == OPTIMUM:
        if len(model.text_specs) > 1:
            return f"base '{base}' has {len(model.text_specs)} text encoders, with which it has not been tested"
        if not installed(["optimum-onnx"]):
            return (
                "it is not installed; pip install optimum-onnx (release 0.1 needs transformers below 4.58, "
                "so use a separate environment)"
            )
        if (vae := model.config("vae").get("_class_name")) == "AutoencoderTiny":
            return f"the decoder of base '{base}' is an {vae}, which optimum's export does not support"
        if model.unet_file is not None:
            return f"base '{base}' has its U-Net in a separate file, but optimum-onnx loads only whole folders"
    return None


def _compiler() -> str | None:
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)

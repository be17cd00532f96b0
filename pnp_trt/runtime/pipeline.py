"""The sampler: generates images for prompts, with one U-Net call per step if the bundle is guided."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import backends
from ..backends.base import LoadOptions, Size
from ..bundle.manifest import TIME_IDS
from ..bundle.profiles import legal_sizes, split
from ..bundle.store import Bundle, open_bundle, rebuild_advice
from ..errors import Cancelled, InputError, PnpError
from ..io.inputs import check_prompts, warn_of_syntax
from ..sampling.device_loop import Feeds, LoopPlan
from ..sampling.loop import Callback, HostLoop
from ..sampling.methods import (
    CFG,
    INTERVAL,
    METHODS,
    HostRun,
    Interval,
    Method,
    baselines_of,
    check_interval,
    default_interval,
    methods_of,
    step_methods_of,
    uses_guidance,
)
from ..sampling.network import STATES, Network
from ..sampling.schedules import Schedule, ddim, evaluations, make, resolve
from ..sampling.step_loop import SLOTS, Run, StepLoop
from .images import read_image
from .prompt_syntax import PLAIN, check_syntax, lora_tags
from .text import ImageSizes, Text, TextEncoders, sharpened, takes_sizes

STEPS = (1, 1000)
DEFAULT_STEPS = 20
#: range of scales that guides are trained for; their images are meaningless outside it
GUIDANCE = (1.0, 9.0)
#: default strength of image-to-image, as in diffusers
DEFAULT_STRENGTH = 0.8
#: maximum number of schedules that a pipeline caches
TABLES = 16
#: a starting image: a file, or pixels uint8 ``[H, W, 3]``
Init = str | Path | np.ndarray


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image: ``pixels`` uint8 ``[H, W, 3]`` and its generation parameters."""

    pixels: np.ndarray
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A validated request for images; lists have one value per image.

    Attributes:
        steps: requested sampling steps; ``table`` has the steps that are run.
        size: height and width in pixels.
        method: name of the method.
        negatives: negative prompts, or None.
        init: starting image (pixels uint8 ``[H, W, 3]`` of ``size``), strength, and the image's name; or None.
        syntax: syntax of prompts and negative prompts.
        context: text states passed by the caller, N rows, or None.
        image_sizes: SDXL's micro-conditioning; None means the image's size, not cropped.
        loras: names and scales of LoRAs that a server merged into the engine for this request.
        dropped: the end of each prompt and of each negative prompt that does not fit; empty if all of it fits.
    """

    engine: str
    prompts: list[str]
    seeds: list[int]
    scales: list[float]
    steps: int
    size: Size
    method: str
    table: Schedule
    negatives: list[str] | None = None
    init: tuple[np.ndarray, float, str] | None = None
    syntax: str = PLAIN
    context: Text | None = None
    image_sizes: ImageSizes | None = None
    loras: tuple[tuple[str, float], ...] = ()
    dropped: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def rows(self) -> int:
        """Rows of the U-Net's batch per image."""
        return sum(METHODS.get(self.method).batches)

    def parameters(self, i: int) -> dict[str, Any]:
        """Generation parameters of image ``i``, as they are stored in it."""
        parameters: dict[str, Any] = {
            "prompt": self.prompts[i], "seed": self.seeds[i], "steps": self.steps, "guidance": self.scales[i],
            "method": self.method, "engine": self.engine, "schedule": self.table.name,
            "size": f"{self.size[0]}x{self.size[1]}",
        }  # fmt: skip
        if self.negatives is not None:
            parameters["negative"] = self.negatives[i]
        if self.syntax != PLAIN:
            parameters["prompt_syntax"] = self.syntax
        for name, ends in zip(("dropped", "negative_dropped"), self.dropped, strict=True):
            if ends and ends[i]:
                parameters[name] = ends[i]
        if self.context is not None:
            parameters["context"] = "given"
        if self.init is not None:
            parameters |= {"init": self.init[2], "strength": self.init[1]}
        if self.image_sizes is not None:
            parameters |= self.image_sizes.parameters()
        if self.loras:
            parameters["loras"] = lora_tags(self.loras)
        return parameters


class Pipeline:
    """A loaded bundle.

    Attributes:
        name: the bundle's name.
        base: identifies the teacher's weights; pipelines of the same base can be compared.
        methods: supported methods: ``guided`` for a bundle with a guide; ``cfg`` and ``unguided`` for a plain one.
        baselines: further methods for comparisons, ``cfg-two-passes`` and ``cfg-interval``, if the bundle is plain and
            the loop runs on the host.
        step_methods: supported methods for images that share calls step by step (:meth:`run`): ``methods``, and for a
            bundle with a guide also ``cfg`` and ``unguided``, because the guide's residuals are zero at w = 1.
        negative_prompts: whether its guide was distilled with negative prompts; CFG always supports them.
        sampling_steps: the only number of steps that its guide was distilled for (stage 2), or None.
        size: default height and width of its images in pixels.
        profiles: batch sizes and image sizes that it was built for; empty if it supports any batch size at one image
            size.
        default_schedule: the teacher's own if it is one of ``SCHEDULES`` and the guide was not distilled for a number
            of DDIM steps, else DDIM.

    Thread-safe: calls use separate buffers, or run one after the other on the GPU.

    Raises:
        InputError: if ``schedule`` is unknown, or is ``teacher`` and the teacher's schedule is not supported.
    """

    def __init__(
        self, bundle: Bundle, *, provider: str = "auto", threads: int | None = None, schedule: str | None = None
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.name: str = bundle.name
        self.base: str = manifest.base.sha256["all"]
        self.max_batch: int = manifest.sample.max_batch
        guide = manifest.guide
        self.negative_prompts: bool = guide is None or bool(guide.negative_prompts)
        self.sampling_steps: int | None = None if guide is None else guide.sampling_steps
        self._latent = (manifest.sample.channels, manifest.sample.height, manifest.sample.width)
        self.size: Size = (manifest.image.height, manifest.image.width)
        self.profiles = manifest.profiles
        self._scheduler = manifest.scheduler
        self.default_schedule = resolve(schedule, self._scheduler, self.sampling_steps)
        backend = backends.of(manifest)
        backend.check(manifest)
        options = LoadOptions(provider, threads)

        def load(name: str) -> Any:
            networks = manifest.networks
            return backend.load(bundle.file(name), networks[name], options) if name in networks else None

        self._text = TextEncoders(bundle, load)
        self._unet, self._vae = load("unet"), load("vae_decoder")
        self._encoder = load("vae_encoder")
        # the part of the guide that depends only on w, if it is a separate network
        self._condition = load("condition")
        # the guide's network that changes the text states by the negative prompt, if it has one
        self._sharpener = load("sharpener")
        #: whether the U-Net takes an original size, a crop and a target size (SDXL)
        self.takes_sizes: bool = takes_sizes(manifest)
        #: runs whole images on a GPU, captured into CUDA graphs; None if the loop runs on the host
        self.loops = backend.device_loops(self._unet, self._vae, self._condition, self.name)
        self.methods: tuple[str, ...] = methods_of(bundle.guided, on_host=self.loops is None)
        self.step_methods: tuple[str, ...] = step_methods_of(bundle.guided)
        self.baselines: tuple[str, ...] = baselines_of(bundle.guided) if self.loops is None else ()
        self._tables: dict[tuple[str, int], Schedule] = {}

    @classmethod
    def load(
        cls,
        engine: str | Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        schedule: str | None = None,
    ) -> Pipeline:
        """Open a bundle by name or path, and check every file against its manifest.

        Args:
            schedule: default schedule; a name as for :meth:`schedule`.

        Raises:
            InputError: if the bundle does not exist or is damaged, or the schedule is unknown.
        """
        return cls(open_bundle(engine), provider=provider, threads=threads, schedule=schedule)

    def schedule(self, steps: int, name: str | None = None) -> Schedule:
        """The table of a sampling run; it is shared between calls and must not be modified.

        Args:
            name: one of ``SCHEDULES`` or ``teacher``, alone or with a spacing (``dpm++:karras``), or the name
                that other programs use (``DPM++ 2M Karras``); None means ``default_schedule``.

        Raises:
            InputError: if the name is unknown, there are too many steps, or the teacher's options are not supported.
        """
        key = name or self.default_schedule, steps
        table = self._tables.get(key)
        if table is None:
            table = make(key[0], self._scheduler, steps)
            if len(self._tables) >= TABLES:
                self._tables.clear()
            self._tables[key] = table
        return table

    def evaluations(self, steps: int, schedule: str | None = None) -> int:
        """Number of evaluations, not doubled for CFG, in ``steps`` steps: 2·steps − 1 for ``heun``, else ``steps``.

        Raises:
            InputError: if the schedule is unknown.
        """
        return evaluations(schedule or self.default_schedule, self._scheduler, steps)

    @property
    def on_gpu(self) -> bool:
        """Whether the U-Net runs on a GPU."""
        return self.loops is not None or "cuda" in self._unet.describe().device.lower()

    def facts(self) -> dict[str, dict[str, int]]:
        """The runtime's figures for each network, by name in the manifest; see ``Network.facts``."""
        networks = {
            **self._text.networks, "unet": self._unet, "vae_decoder": self._vae, "vae_encoder": self._encoder,
            "condition": self._condition, "sharpener": self._sharpener,
        }  # fmt: skip
        return {name: network.facts() for name, network in networks.items() if network is not None}

    def guided_interval(self) -> Interval:
        """Default lowest and highest timestep at which ``cfg-interval`` applies CFG."""
        return default_interval(self._scheduler)

    def encode(self, prompts: Sequence[str], syntax: str = PLAIN) -> Text:
        """Text states ``[N, tokens, D]`` float32, with SDXL's pooled text; ``np.asarray`` returns only the states.

        With ``a1111``, on an engine for prompts of several chunks, all prompts are padded with empty chunks to the
        length of the longest.

        Args:
            syntax: one of ``SYNTAXES``: ``plain``, or ``a1111`` for weights such as ``(x:1.3)``.

        Raises:
            InputError: if the syntax is unknown, or a prompt or weight is invalid.
        """
        check_syntax(syntax)
        check_prompts(prompts)
        return self._text(prompts, syntax)

    def check_size(self, size: Size | None) -> Size:
        """Check a size in pixels and return it, or the default if it is None.

        Raises:
            InputError: if the engine was not built for it; the message lists the legal sizes.
        """
        if size is None or tuple(size) == self.size:
            return self.size
        if not any(p.sized and p.holds_size(size) for p in self.profiles):
            legal = legal_sizes(self.profiles) or f"{self.size[0]}x{self.size[1]}"
            raise InputError(
                f"size is {size[0]}x{size[1]}; engine '{self.name}' supports {legal} (height x width in pixels); "
                "choose one of these, or build another engine with --profile b1@HEIGHTxWIDTH"
            )
        return size[0], size[1]

    def largest_batch(self, size: Size | None = None) -> int:
        """Largest batch size for images of ``size`` (pixels)."""
        image_size = self.check_size(size)
        return max((p.maximum for p in self.profiles if p.holds_size(image_size)), default=self.max_batch)

    def legal_batches(self, size: Size | None = None) -> list[int]:
        """Batch sizes that the engine supports for images of ``size`` (pixels)."""
        image_size, most = self.check_size(size), self.largest_batch(size)
        sized = [p for p in self.profiles if p.holds_size(image_size)]
        return [b for b in range(1, most + 1) if not sized or any(p.minimum <= b <= p.maximum for p in sized)]

    def noise(self, seeds: Sequence[int], size: Size | None = None) -> np.ndarray:
        """Unit Gaussian latents ``[N, C, H, W]`` float32; each depends only on its own seed and the size.

        Args:
            size: height and width of the images in pixels; None means the default.
        """
        channels, height, width = self._latent
        image_size = self.check_size(size)
        latent = (channels, image_size[0] * height // self.size[0], image_size[1] * width // self.size[1])
        out = np.empty((len(seeds), *latent), np.float32)
        for row, seed in zip(out, seeds, strict=True):
            np.random.Generator(np.random.Philox(seed)).standard_normal(dtype=np.float32, out=row)
        return out

    def denoise(
        self,
        context: Text | np.ndarray,
        noise: np.ndarray,
        *,
        steps: int,
        guidance: np.ndarray | float,
        method: str | None = None,
        callback: Callback | None = None,
        negative: Text | np.ndarray | None = None,
        schedule: str | Schedule | None = None,
        image: np.ndarray | None = None,
        guided_interval: Interval | None = None,
        image_sizes: ImageSizes | None = None,
    ) -> np.ndarray:
        """Run the whole loop from unit noise to final latents ``[N, C, H, W]``.

        Args:
            context: result of :meth:`encode`, N rows; or text states ``[N, tokens, D]`` if the U-Net needs no more.
            noise: ``[N, C, H, W]``; its height and width determine the image's.
            guidance: w, one for all or ``[N]``.
            method: one of ``methods`` or ``baselines``; None means the first.
            callback: called with (steps done, steps) after each step; if it returns False, sampling stops.
            negative: the same of negative prompts; None means the empty prompt, which is zeros for SDXL.  The shorter
                of both is padded with empty chunks.
            schedule: a name, as for :meth:`schedule`, or a table, whose length then replaces ``steps``.
            image: clean latents of the starting image, ``[N, C, H, W]``, or ``[1, C, H, W]`` for all.
            guided_interval: lowest and highest timestep with CFG, for ``cfg-interval``; None means
                :meth:`guided_interval`.
            image_sizes: SDXL's micro-conditioning; None means the image's size, not cropped.

        Raises:
            InputError: if the method or schedule is unknown, the interval is out of range, the engine does not support
                the batch size, or it does not take ``image_sizes``.
            Cancelled: if the callback returned False.
        """
        table = schedule if isinstance(schedule, Schedule) else self.schedule(steps, schedule)
        return self._run(
            context, noise, table, guidance, method, callback, negative, image, guided_interval, image_sizes,
            decode=False,
        )  # fmt: skip

    def _run(
        self,
        context: Text | np.ndarray,
        noise: np.ndarray,
        table: Schedule,
        guidance: np.ndarray | float,
        method: str | None,
        callback: Callback | None,
        negative: Text | np.ndarray | None,
        image: np.ndarray | None,
        interval: Interval | None,
        image_sizes: ImageSizes | None,
        *,
        decode: bool,
    ) -> np.ndarray:
        """As :meth:`denoise`, but with ``decode`` return pixels uint8 ``[N, H, W, 3]``."""
        method = method or self.methods[0]
        if method not in self.methods + self.baselines:
            raise InputError(f"engine '{self.name}' cannot do '{method}'; {self._can_do(method)}")
        kind = METHODS.get(method)
        if interval is not None:
            if not kind.has_interval:
                raise InputError(_no_interval(method))
            check_interval(interval, self._scheduler)
        n = len(noise)
        w = np.asarray(guidance, np.float32)
        if w.shape != (n,):
            w = np.broadcast_to(w, (n,))
        x = _first(table, noise, image)
        twice = kind.reads_both_texts
        size = (noise.shape[-2], noise.shape[-1])
        inputs = self._inputs(kind, Text.of(context), w, negative, size, image_sizes)
        if self.loops is not None:
            plan = LoopPlan(n, size, table, twice, decode, inputs[STATES].shape[1])
            result = self.loops.run(plan, Feeds(x, w, inputs), callback)
            if decode:
                self._check_finite("latents", result.bad_latents)
                self._check_finite("decoded pixels", result.bad_pixels)
            return result.values
        network = self._unet.for_states(inputs)
        if kind.sample is not None:
            cfg_interval = interval or (self.guided_interval() if kind.has_interval else (0, 0))
            latents = kind.sample(HostRun(network, table, x, w, inputs, cfg_interval), callback)
        else:
            with network.bind(2 * n if twice else n, size) as unet:
                unet.write(**inputs)
                if self._condition is not None:
                    unet.write(condition=self._condition(guidance=inputs["guidance"]))
                latents = HostLoop(unet, table, noise.shape, w if twice else None).run(x, callback)
        return self.decode(latents) if decode else latents

    def _inputs(
        self, kind: Method, text: Text, w: np.ndarray, negative: Text | np.ndarray | None, size: Size,
        image_sizes: ImageSizes | None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """The U-Net's inputs besides latents, timestep and ``condition``, for a batch of N rows, or 2N for CFG.

        Args:
            text, negative: text of the prompts and negative prompts, N rows; None means the empty prompt.
            w: guidance scales, ``[N]``.
            size: size of the latents.
        """
        if lacking := [name for name in self._text.added if name not in text.added]:
            raise InputError(
                f"engine '{self.name}' needs {', '.join(lacking)} of prompts, but got only text states; "
                "pass the result of encode"
            )
        twice, guided = kind.reads_both_texts, self.bundle.guided
        reads_negative = guided and self.negative_prompts and self._sharpener is None
        if negative is None and (twice or reads_negative):
            negative_text = self._text.empty(text.shape[1]).repeated(len(text))
        elif negative is not None:
            negative_text = Text.of(negative)
            tokens = max(text.shape[1], negative_text.shape[1])
            text, negative_text = (each.longer(tokens, self._text.chunk) for each in (text, negative_text))
        else:
            negative_text = text
        if kind.guided and self._sharpener is not None and negative is not None:
            text = sharpened(self._sharpener, text, negative_text, self._text.empty(self._text.length), w)
        inputs = (Text.joined([negative_text, text]) if twice else text).inputs()
        rows = len(inputs[STATES])
        self._check_image_sizes(image_sizes)
        if self.takes_sizes:
            height, width = (
                side * own // latent for side, own, latent in zip(size, self.size, self._latent[1:], strict=True)
            )
            inputs[TIME_IDS] = (image_sizes or ImageSizes()).time_ids((height, width), rows)
        if guided:  # at w = 1 the guide adds nothing
            inputs["guidance"] = w if kind.guided else np.ones(rows, np.float32)
        if reads_negative:
            inputs["negative"] = np.concatenate([negative_text.states] * 2) if twice else negative_text.states
        return inputs

    def run(self, prepared: Prepared, i: int) -> Run:
        """Encode image ``i`` for a :class:`~pnp_trt.sampling.step_loop.StepLoop`: its text and starting latents.

        Raises:
            InputError: if the method is not one of ``step_methods``.
        """
        self.check_step_method(prepared.method)
        kind, table = METHODS.get(prepared.method), prepared.table
        scale = np.array([prepared.scales[i]], np.float32)
        states, negative = self._texts(prepared, [i])
        noise = self.noise([prepared.seeds[i]], prepared.size)
        size = (noise.shape[-2], noise.shape[-1])
        inputs = self._inputs(kind, states, scale, negative, size, prepared.image_sizes)
        if self._condition is not None:
            inputs["condition"] = np.concatenate([self._condition(guidance=g[None]) for g in inputs["guidance"]])
        image = None if prepared.init is None else self.encode_image(prepared.init[0][None])
        start = _first(table, noise, image)
        rows = tuple({name: value[row] for name, value in inputs.items()} for row in range(prepared.rows))
        return Run(table, start[0], rows, float(scale[0]))

    def check_step_method(self, method: str) -> None:
        """Raise ``InputError`` if the method is not one of ``step_methods``."""
        if method not in self.step_methods:
            raise InputError(
                f"engine '{self.name}' cannot do '{method}' step by step; it can do: {', '.join(self.step_methods)}"
            )

    def step_loop(self, slots: int = 8, buckets: Iterable[int] | None = None) -> StepLoop:
        """Create a loop over this pipeline's U-Net for images of :meth:`run`.

        Args:
            slots: maximum rows of a call; fewer if the engine was built for fewer.
            buckets: batch sizes that calls are padded to; None means those that the engine was built for and the
                runtime has prepared (``Network.batches``).

        Raises:
            InputError: if ``slots`` is below 1, or the engine was not built for a batch size.
        """
        legal = self.legal_batches()
        slots = max((b for b in legal if b <= slots), default=slots)
        if buckets is None:
            ready = self._unet.batches(slots) if slots > 0 else ()
            chosen = [b for b in ready if b in legal] or legal[:1]
        else:
            chosen = list(buckets)
        if wrong := [b for b in chosen if b not in legal]:
            raise InputError(
                f"a bucket is {wrong[0]}; engine '{self.name}' takes batches of {', '.join(map(str, legal))}"
            )
        return StepLoop(self._unet, slots, chosen)

    def _can_do(self, method: str) -> str:
        """Part of the message for an unsupported method: the supported ones."""
        if method in methods_of(self.bundle.guided) + baselines_of(self.bundle.guided):
            return (
                "it runs step by step on the host, but this engine's loop runs on the GPU; "
                f"use {' or '.join(self.methods)}"
            )
        return f"it can do: {', '.join(dict.fromkeys(self.methods + self.step_methods))}"

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images, uint8 ``[N, H, W, 3]`` of a supported size, to clean latents ``[N, C, H, W]`` float32.

        Raises:
            InputError: if the engine has no VAE encoder.
        """
        encoder = self._check_encoder()
        scaled = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        return np.concatenate([encoder(pixels=row[None]) for row in scaled])

    def _check_encoder(self) -> Network:
        if self._encoder is None:
            raise InputError(
                f"engine '{self.name}' has no VAE encoder, which a starting image needs; "
                + rebuild_advice(self.bundle.folder, self.bundle.manifest.rebuild, "--image-to-image")
            )
        return self._encoder

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents to pixels uint8 ``[N, H, W, 3]``.

        Raises:
            PnpError: if the latents or the pixels are not finite; NaN is never returned as a black image.
        """
        with self._vae.bind(len(latents), (latents.shape[-2], latents.shape[-1])) as vae:
            vae.write(latents=latents)
            vae.run()
            pixels = vae.output()  # the network's own buffer if in host memory; the next run overwrites it
            for name, value in (("latents", latents), ("decoded pixels", pixels)):
                if not (finite := np.isfinite(value)).all():
                    self._check_finite(name, ~finite.all(axis=(1, 2, 3)))
            np.add(pixels, 1, out=pixels)
            np.multiply(pixels, 127.5, out=pixels)
            np.rint(pixels, out=pixels)
            np.maximum(pixels, 0, out=pixels)
            np.minimum(pixels, 255, out=pixels)
            return pixels.transpose(0, 2, 3, 1).astype(np.uint8, order="C")

    def _check_finite(self, what: str, bad: np.ndarray) -> None:
        """Raise ``PnpError`` if any image is bad, ``[N]`` bool."""
        if bad.any():
            raise PnpError(
                f"engine '{self.name}': the {what} of image {np.flatnonzero(bad)[0]} are not finite; "
                "check the weights it was built from, or rebuild with --precision fp32"
            )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | Sequence[float] = 3.0,
        seed: int | Sequence[int] = 0,
        method: str | None = None,
        negative: str | Sequence[str] | None = None,
        schedule: str | None = None,
        init: Init | None = None,
        strength: float | None = None,
        callback: Callback | None = None,
        size: Size | None = None,
        guided_interval: Interval | None = None,
        prompt_syntax: str = PLAIN,
        context: Text | np.ndarray | None = None,
        image_sizes: ImageSizes | None = None,
    ) -> list[GeneratedImage]:
        """Generate images for prompts.

        Args:
            prompts: one or several.
            steps: sampling steps, 1 … 1000; None means :meth:`default_steps`.
            guidance: w, one for all or one per prompt, 1 … 9.
            seed: one for all prompts, or one per prompt.
            method: one of ``methods``, ``step_methods`` or ``baselines``; None means :meth:`default_method`.
            negative: negative prompt, one for all or one per prompt.
            schedule: a name, as for :meth:`schedule`; None means ``default_schedule``.
            init: starting image; if its size is not ``size``, it is resized with a warning.
            strength: with ``init``, the fraction of the steps to run, above 0 and at most 1; None means 0.8.
            callback: called with (steps done, total steps) during sampling, where each evaluation counts as a step; if
                it returns False, sampling stops.
            size: height and width in pixels, for which the engine must have been built; None means its default.
            guided_interval: lowest and highest timestep with CFG, for method ``cfg-interval``.
            prompt_syntax: ``plain``, or ``a1111`` for weights such as ``(x:1.3)`` in prompts and negative prompts.
            context: text of the prompts, a result of :meth:`encode`, or states ``[N, tokens, D]`` if the U-Net needs
                no more.  It replaces the encoded prompts, which are then only recorded.
            image_sizes: SDXL's original size, crop and target size; None means the image's size, not cropped.

        Raises:
            InputError: if a value is out of range, lists differ in length, text states have another shape, or an image
                cannot be read.
            Cancelled: if the callback returned False.
        """
        prepared = self.prepare(
            prompts, steps=steps, guidance=guidance, seed=seed, method=method, negative=negative, schedule=schedule,
            init=init, strength=strength, size=size, prompt_syntax=prompt_syntax, context=context,
            image_sizes=image_sizes,
        )  # fmt: skip
        if prepared.method not in self.methods + self.baselines and prepared.method in self.step_methods:
            if guided_interval is not None:
                raise InputError(_no_interval(prepared.method))
            return self._step_by_step(prepared, callback)
        batches, table_steps = self._batches(prepared), len(prepared.table)
        image = None if prepared.init is None else self.encode_image(prepared.init[0][None])
        out: dict[int, GeneratedImage] = {}
        total = table_steps * len(batches)
        for number, part in enumerate(batches):
            report = (lambda i, _, done=table_steps * number: callback(done + i, total)) if callback else None
            states, others = self._texts(prepared, part)
            images = self._run(
                states, self.noise([prepared.seeds[i] for i in part], prepared.size), prepared.table,
                np.array([prepared.scales[i] for i in part], np.float32), prepared.method, report, others, image,
                guided_interval, image_sizes, decode=True,
            )  # fmt: skip
            out |= {i: GeneratedImage(pixels, prepared.parameters(i)) for i, pixels in zip(part, images, strict=True)}
        return [out[i] for i in range(len(out))]

    def default_method(self, negative: str | Sequence[str] | None) -> str:
        """The default method of a request: the first of ``methods``.

        If there is a negative prompt that the guide does not support, it is CFG: exact, at two model evaluations per
        step.
        """
        has_negative = any([negative] if isinstance(negative, str) else negative or ())
        unread = has_negative and not self.negative_prompts and CFG.name in self.step_methods
        return CFG.name if unread else self.methods[0]

    def default_steps(self, method: str) -> int:
        """The default steps of a request: those that the guide was distilled for, if the method uses it, or 20."""
        return self._distilled_steps(method) or DEFAULT_STEPS

    def _distilled_steps(self, method: str) -> int | None:
        """The only number of steps that the guide was distilled for, if the method uses it; None for any."""
        return self.sampling_steps if method in METHODS and METHODS.get(method).guided else None

    def _step_by_step(self, prepared: Prepared, callback: Callback | None) -> list[GeneratedImage]:
        """Generate images with a method that is only supported step by step; progress and errors as in a call."""
        loop = self.step_loop(max(SLOTS, prepared.rows))
        if loop.slots < prepared.rows:
            raise InputError(
                f"method '{prepared.method}' needs {prepared.rows} rows of a batch, but engine '{self.name}' was built "
                f"for {loop.slots}; " + rebuild_advice(self.bundle.folder, self.bundle.manifest.rebuild, "--profile b2")
            )
        tickets = [
            loop.submit(partial(self.run, prepared, i), len(prepared.table), prepared.rows)
            for i in range(len(prepared.prompts))
        ]
        total = len(tickets) * len(prepared.table)
        while not all(ticket.over for ticket in tickets):
            loop.step()
            done = sum(ticket.steps_done for ticket in tickets)
            if callback is not None and callback(done, total) is False:
                raise Cancelled(f"sampling was cancelled after {done} of {total} steps")
        latents = []
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
            assert ticket.latents is not None
            latents.append(ticket.latents)
        remaining, pixels = iter(latents), list[np.ndarray]()
        for n in split(len(latents), self.legal_batches(prepared.size)):
            pixels += list(self.decode(np.stack(list(itertools.islice(remaining, n)))))
        return [GeneratedImage(image, prepared.parameters(i)) for i, image in enumerate(pixels)]

    def _batches(self, prepared: Prepared) -> list[list[int]]:
        """Group images into batches that the engine supports, where all text states have the same number of tokens.

        This ensures that no image depends on the others' prompts.
        """
        by_tokens: dict[int, list[int]] = {}
        for i in range(len(prepared.prompts)):
            by_tokens.setdefault(self._tokens(prepared, i), []).append(i)
        legal = self.legal_batches(prepared.size)
        batches = []
        for indices in by_tokens.values():
            rest = iter(indices)
            batches += [list(itertools.islice(rest, n)) for n in split(len(indices), legal)]
        return batches

    def _tokens(self, prepared: Prepared, i: int) -> int:
        """Number of tokens of image ``i``: that of the longer one of its prompt and negative prompt."""
        context, negatives, syntax = prepared.context, prepared.negatives, prepared.syntax
        own = self._text.tokens(prepared.prompts[i], syntax) if context is None else context.shape[1]
        return own if negatives is None else max(own, self._text.tokens(negatives[i], syntax))

    def _texts(self, prepared: Prepared, part: Sequence[int]) -> tuple[Text, Text | None]:
        """Text of some of the images, and that of their negative prompts or None."""
        context, negatives, syntax = prepared.context, prepared.negatives, prepared.syntax
        states = (
            context[list(part)] if context is not None else self.encode([prepared.prompts[i] for i in part], syntax)
        )
        return states, None if negatives is None else self.encode([negatives[i] for i in part], syntax)

    def prepare(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | Sequence[float] = 3.0,
        seed: int | Sequence[int] = 0,
        method: str | None = None,
        negative: str | Sequence[str] | None = None,
        schedule: str | None = None,
        init: Init | None = None,
        strength: float | None = None,
        size: Size | None = None,
        prompt_syntax: str = PLAIN,
        context: Text | np.ndarray | None = None,
        image_sizes: ImageSizes | None = None,
    ) -> Prepared:
        """Check a request without computing anything; arguments and errors as in a call."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [int(s) for s in ([seed] * len(prompts) if isinstance(seed, int | np.integer) else seed)]
        w: Any = guidance
        scales = [float(g) for g in ([w] * len(prompts) if np.ndim(w) == 0 else w)]
        method = method or self.default_method(negative)
        steps = self.default_steps(method) if steps is None else steps
        check_request(prompts, seeds, scales, steps)
        check_syntax(prompt_syntax)
        warn_of_syntax(
            [*prompts, *([negative] if isinstance(negative, str) else negative or [])],
            weighted=prompt_syntax != PLAIN,
            breaks=self._text.chunks > 1,
        )
        text = None if context is None else self._check_context(context, len(prompts))
        image_size = self.check_size(size)
        self._check_image_sizes(image_sizes)
        negatives = self._avoided(negative, len(prompts), method)
        table = self.schedule(steps, schedule)
        start = self._start(init, strength, image_size)
        if start is not None:
            table = table.start(start[1])
        distilled_for = self._distilled_steps(method)
        if distilled_for not in (None, steps):
            warnings.warn(
                f"the guide of engine '{self.name}' was distilled for {distilled_for} steps and is run with "
                f"{steps}; its images may be wrong",
                stacklevel=3,
            )
        if distilled_for is not None and table.name != ddim.name:
            warnings.warn(
                f"the guide of engine '{self.name}' was distilled under DDIM and is run with {table.name}; its "
                "images may be off",
                stacklevel=3,
            )
        encoded = [] if text is not None else prompts
        dropped = (
            tuple(self._text.dropped(p, prompt_syntax) for p in encoded),
            tuple(self._text.dropped(p, prompt_syntax) for p in negatives or ()),
        )
        return Prepared(
            self.name, prompts, seeds, scales, steps, image_size, method, table, negatives, start, prompt_syntax,
            text, image_sizes, dropped=dropped,
        )  # fmt: skip

    def _check_context(self, context: Text | np.ndarray, count: int) -> Text:
        """Return a caller's text as float32; raise ``InputError`` if it does not fit the prompts."""
        text = Text.of(context)
        states, width = text.states, self.bundle.manifest.networks["unet"].inputs[STATES][1][2]
        legal = [self._text.length * chunks for chunks in range(1, self._text.chunks + 1)]
        shapes = [(count, tokens, width) for tokens in legal]
        if states.shape not in shapes or states.dtype.kind != "f" or not np.isfinite(states).all():
            raise InputError(
                f"context is {states.dtype} of shape {list(states.shape)}; pass finite text states of shape "
                f"{' or '.join(str(list(shape)) for shape in shapes)}"
            )
        return Text(states.astype(np.float32), text.added)

    def _check_image_sizes(self, image_sizes: ImageSizes | None) -> None:
        if image_sizes is not None and not self.takes_sizes:
            raise InputError(
                f"engine '{self.name}' takes no original size, crop or target size; leave them out (they are for SDXL)"
            )

    def _start(self, init: Init | None, strength: float | None, size: Size) -> tuple[np.ndarray, float, str] | None:
        """Pixels, strength and name of the starting image; None if there is none."""
        if init is None:
            if strength is not None:
                raise InputError(f"strength is {strength:g}, but no starting image was given; pass --init too")
            return None
        pixels, name = read_image(init, size)
        self._check_encoder()
        return pixels, DEFAULT_STRENGTH if strength is None else float(strength), name

    def _avoided(self, negative: str | Sequence[str] | None, count: int, method: str) -> list[str] | None:
        """The negative prompt of each image; None if there is none."""
        if negative is None:
            return None
        negatives = [negative] * count if isinstance(negative, str) else list(negative)
        read = self.negative_prompts or (method in METHODS and not METHODS.get(method).guided)
        if not read or not uses_guidance(method):
            if not any(negatives):
                return None
            raise InputError(
                f"engine '{self.name}' takes no negative prompt with method '{method}'; leave it out, or use "
                "method 'cfg'"
            )
        check_prompts(negatives, "the negative prompt")
        if len(negatives) != count:
            raise InputError(f"{count} prompts and {len(negatives)} negative prompts were given; give one, or one each")
        return negatives


def _no_interval(method: str) -> str:
    return f"guided_interval goes with method '{INTERVAL.name}', not with '{method}'"


def _first(table: Schedule, noise: np.ndarray, image: np.ndarray | None) -> np.ndarray:
    """Initial latents ``[N, C, H, W]`` from unit noise and, for image-to-image, clean latents."""
    if image is not None:
        start: np.ndarray = table.image_scale[0] * image + table.noise_scale[0] * noise
        return start
    return noise if table.init_scale == 1.0 else noise * np.float32(table.init_scale)


def check_request(prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float], steps: int) -> None:
    """Raise ``InputError`` with the legal range for the first value that is out of range."""
    if not prompts:
        raise InputError("no prompt was given; pass at least one")
    check_prompts(prompts)
    if not STEPS[0] <= steps <= STEPS[1]:
        raise InputError(f"steps is {steps}; it must be between {STEPS[0]} and {STEPS[1]}")
    for w in scales:
        if not GUIDANCE[0] <= w <= GUIDANCE[1]:  # also refuses NaN
            raise InputError(f"guidance is {w:g}; it must be between {GUIDANCE[0]:g} and {GUIDANCE[1]:g}")
    for s in seeds:
        if not 0 <= s < 2**63:
            raise InputError(f"seed is {s}; it must be between 0 and {2**63 - 1}")
    for name, values in (("seed", seeds), ("guidance", scales)):
        if len(values) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts and {len(values)} values of {name} were given; give one, or one each"
            )

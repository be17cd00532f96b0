"""The sampler: prompts in, pictures out, one engine call a step when the bundle is guided."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import backends
from ..artifacts import Bundle, open_bundle
from ..backends.base import Bound, LoadOptions
from ..errors import InputError, PnpError
from .schedule import ddim
from .tokenizer import Tokenizer

STEPS = (1, 1000)
DEFAULT_STEPS = 20
#: scales that guides are trained for; outside it their pictures mean nothing
GUIDANCE = (1.0, 9.0)


@dataclass(frozen=True)
class Picture:
    """One result: ``pixels`` uint8 ``[H, W, 3]`` and the parameters that made it."""

    pixels: np.ndarray
    parameters: dict[str, Any]


class Pipeline:
    """A loaded bundle.

    Attributes:
        name: the bundle's name.
        base: what identifies the teacher's weights; pipelines of one base can be compared.
        methods: what it can do: ``guided`` for a bundle with a guide; ``cfg`` and ``unguided`` for a plain one.
        negative_prompts: whether its guide was distilled with negative prompts; CFG takes them in any case.
        sampling_steps: the only number of steps that its guide was distilled for (stage 2), or None.
    """

    def __init__(self, bundle: Bundle, *, provider: str = "auto", threads: int | None = None) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.name: str = bundle.name
        self.base: str = manifest["base"]["sha256"]["all"]
        self.methods: tuple[str, ...] = ("guided",) if bundle.guided else ("cfg", "unguided")
        self.max_batch: int = manifest["sample"]["max_batch"]
        guide = manifest["guide"] or {}
        self.negative_prompts: bool = not bundle.guided or bool(guide.get("negative_prompts"))
        self.sampling_steps: int | None = guide.get("sampling_steps")
        self._latent = (manifest["sample"]["channels"], manifest["sample"]["height"], manifest["sample"]["width"])
        self._scheduler = manifest["scheduler"]
        self._tokenizer = Tokenizer(
            bundle.folder / "tokenizer.json", manifest["tokens"]["length"], manifest["tokens"]["pad"]
        )
        backend = backends.get(manifest["backend"])
        backend.check(manifest)
        options = LoadOptions(provider, threads)
        self._text, self._unet, self._vae = (
            backend.load(bundle.file(n), manifest["networks"][n], options)
            for n in ("text_encoder", "unet", "vae_decoder")
        )
        # what the guide makes of w alone, where it is a network of its own
        self._condition = (
            backend.load(bundle.file("condition"), manifest["networks"]["condition"], options)
            if "condition" in manifest["networks"]
            else None
        )
        self._empty: np.ndarray | None = None

    @classmethod
    def load(cls, engine: str | Path, *, provider: str = "auto", threads: int | None = None) -> Pipeline:
        """Open a bundle by name or path, every file checked against its manifest.

        Raises:
            InputError: if there is no such bundle, or it is damaged.
        """
        return cls(open_bundle(engine), provider=provider, threads=threads)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Text states ``[N, tokens, D]`` float32."""
        ids = self._tokenizer(list(prompts))
        # one row at a time: a prompt's states must not depend on what else is asked for
        return np.concatenate([self._text(input_ids=row[None]) for row in ids])

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        """Unit Gaussian latents ``[N, C, H, W]`` float32; each depends on its own seed alone."""
        return np.stack(
            [np.random.Generator(np.random.Philox(s)).standard_normal(self._latent, np.float32) for s in seeds]
        )

    def denoise(
        self,
        context: np.ndarray,
        noise: np.ndarray,
        *,
        steps: int,
        guidance: np.ndarray | float,
        method: str | None = None,
        callback: Callable[[int, int], None] | None = None,
        negative: np.ndarray | None = None,
    ) -> np.ndarray:
        """The whole loop, from unit noise to final latents ``[N, C, H, W]``.

        Args:
            context: text states ``[N, tokens, D]``.
            noise: ``[N, C, H, W]``.
            guidance: w, one for all or ``[N]``.
            method: one of ``methods``; ``None`` takes the first.
            callback: called with (steps done, steps) after each step.
            negative: text states of negative prompts, ``[N, tokens, D]``; None stands for the empty prompt.
        """
        method = method or self.methods[0]
        if method not in self.methods:
            raise InputError(f"engine '{self.name}' cannot do '{method}'; it can do: {', '.join(self.methods)}")
        schedule = ddim(self._scheduler, steps)
        n = len(noise)
        w = np.broadcast_to(np.asarray(guidance, np.float32), (n,))
        x = noise * np.float32(schedule.init_scale)
        twice = method == "cfg"
        reads = self.bundle.guided and self.negative_prompts
        other = negative
        if other is None and (twice or reads):
            other = np.broadcast_to(self._unconditional(), context.shape)
        if twice:
            context = np.concatenate([np.asarray(other), context])
        with self._unet.bind(2 * n if twice else n) as unet:
            unet.write(encoder_hidden_states=context)
            if method == "guided":
                unet.write(guidance=w)
            if self._condition is not None:
                unet.write(condition=self._condition(guidance=w))
            if reads:
                unet.write(negative=np.asarray(other))
            for i in range(len(schedule)):
                t = np.full(2 * n if twice else n, schedule.timesteps[i])
                output = _cfg(unet, x, t, w) if twice else _once(unet, x, t)
                x = schedule.x_scale[i] * x + schedule.output_scale[i] * output
                if callback is not None:
                    callback(i + 1, steps)
        return x

    def _unconditional(self) -> np.ndarray:
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pixels uint8 ``[N, H, W, 3]``.

        Raises:
            PnpError: if the latents or the pixels are not finite; a black picture is never returned for NaN.
        """
        for name, value in (("latents", latents), ("decoded pixels", pixels := self._vae(latents=latents))):
            if not np.isfinite(value).all():
                bad = np.flatnonzero(~np.isfinite(value).all(axis=(1, 2, 3)))
                raise PnpError(
                    f"engine '{self.name}': the {name} of picture {bad[0]} are not finite; "
                    "check the weights it was built from, or rebuild with --precision fp32"
                )
        return np.clip(np.round((pixels.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255).astype(np.uint8)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | Sequence[float] = 3.0,
        seed: int | Sequence[int] = 0,
        method: str | None = None,
        negative: str | Sequence[str] | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Picture]:
        """Pictures for prompts.

        Args:
            prompts: one or several.
            steps: sampling steps, 1 … 1000; None takes the number that the guide was distilled for, or 20.
            guidance: w, one for all or one per prompt, 1 … 9.
            seed: one for all prompts, or one each.
            negative: negative prompt, one for all or one each.
            callback: called with (steps done, steps in all) as the work goes on.

        Raises:
            InputError: for values out of range, or lists whose lengths differ.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        scales = [float(guidance)] * len(prompts) if isinstance(guidance, int | float) else [float(g) for g in guidance]
        steps = steps if steps is not None else self.sampling_steps or DEFAULT_STEPS
        check_request(prompts, seeds, scales, steps)
        method = method or self.methods[0]
        avoided = self._avoided(negative, len(prompts), method)
        if self.sampling_steps not in (None, steps):
            warnings.warn(
                f"the guide of engine '{self.name}' was distilled for {self.sampling_steps} steps and is run with "
                f"{steps}; its pictures may be off",
                stacklevel=2,
            )
        out: list[Picture] = []
        total = steps * -(-len(prompts) // self.max_batch)
        for start in range(0, len(prompts), self.max_batch):
            part = slice(start, start + self.max_batch)
            done = steps * (start // self.max_batch)
            report = (lambda i, _, done=done: callback(done + i, total)) if callback else None
            latents = self.denoise(
                self.encode(prompts[part]), self.noise(seeds[part]),
                steps=steps, guidance=np.array(scales[part], np.float32), method=method, callback=report,
                negative=None if avoided is None else self.encode(avoided[part]),
            )  # fmt: skip
            for i, pixels in enumerate(self.decode(latents)):
                parameters = {
                    "prompt": prompts[start + i], "seed": seeds[start + i], "steps": steps,
                    "guidance": scales[start + i],
                    "method": method, "engine": self.name, "schedule": "ddim",
                } | ({} if avoided is None else {"negative": avoided[start + i]})  # fmt: skip
                out.append(Picture(pixels, parameters))
        return out

    def _avoided(self, negative: str | Sequence[str] | None, count: int, method: str) -> list[str] | None:
        """The negative prompt of each picture; None where there is none."""
        if negative is None:
            return None
        if not self.negative_prompts or method == "unguided":
            raise InputError(
                f"engine '{self.name}' takes no negative prompt with method '{method}': its guide was distilled "
                "without; leave it out, use CFG on a plain engine, or distil with --negative 0.3"
            )
        found = [negative] * count if isinstance(negative, str) else list(negative)
        if len(found) != count:
            raise InputError(f"{count} prompts and {len(found)} negative prompts were given; give one, or one each")
        return found


def _once(unet: Bound, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    unet.write(sample=x, timestep=t)
    unet.run()
    return unet.read()


def _cfg(unet: Bound, x: np.ndarray, t: np.ndarray, w: np.ndarray) -> np.ndarray:
    # Ho & Salimans 2022: one batch of two, unconditional first
    both = _once(unet, np.concatenate([x, x]), t)
    unconditional, conditional = both[: len(x)], both[len(x) :]
    return unconditional + w[:, None, None, None] * (conditional - unconditional)


def check_request(prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float], steps: int) -> None:
    """Raise ``InputError`` with the legal range for the first value that is outside it."""
    if not prompts:
        raise InputError("no prompt was given; pass at least one")
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

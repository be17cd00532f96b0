"""Batched sampling for measurements: no guidance, CFG, CFG on an interval, or a guide, by coefficient tables.

Each image starts from its own seed, so it does not depend on its batch, and each caption is encoded only once.
The U-Net is any function of (latents, timesteps, text, w); ``network.py`` provides fast ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pnp_trt.bench.metrics import fidelity
from pnp_trt.errors import InputError
from pnp_trt.processor import multiplies
from pnp_trt.sampling.schedules import Schedule, ddim

from .data import Style, caption
from .free import RULES, Evaluate, Predict

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
BATCH = 64
#: bfloat16 is used only if its images have at least this mean PSNR (dB) to float32's
SAME_TO_THE_EYE = 30.0


@dataclass(frozen=True)
class Ask:
    """One image to generate: its concept, style and seed."""

    concept: str
    style: str
    seed: int

    @property
    def prompt(self) -> str:
        return caption(self.concept, self.style)


def asks(concepts: Sequence[str], styles: Sequence[Style], count: int) -> list[Ask]:
    """``count`` captions, round-robin over shuffled concepts and styles; the second round swaps the styles."""
    order = list(concepts)
    random.Random(0).shuffle(order)
    n, s = len(order), len(styles)
    return [Ask(order[i % n], styles[(i + i // n * (n % s + 1)) % s].word, 1000 + i) for i in range(count)]


#: kinds of guidance besides :data:`~.free.RULES`
KINDS = ("none", "cfg", "interval", "guided")


@dataclass(frozen=True)
class Guidance:
    """How a step is guided.

    Attributes:
        kind: ``none`` (the conditional prediction), ``cfg`` (two evaluations), ``interval`` (two evaluations inside an
            interval of timesteps, the conditional prediction outside: Kynkäänniemi et al. 2024, "Applying guidance
            in a limited interval improves sample and distribution quality", eq. 5), ``guided`` (one evaluation with a
            guide), or a key of :data:`~.free.RULES`.
        w: the scale; unused by ``none``.
        interval: first and last guided timestep (t_low, t_high), both guided; only for ``interval``.
        every: period of the periodic rules.
    """

    kind: str
    w: float = 1.0
    interval: tuple[int, int] | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, *RULES):
            raise InputError(f"unknown guidance kind {self.kind!r}; available: {', '.join((*KINDS, *RULES))}")
        periodic = self.kind in RULES and RULES[self.kind].periodic
        if periodic != (self.every is not None) or (self.every is not None and self.every < 1):
            raise InputError(
                f"guidance {self.kind!r} with every = {self.every}: cached and anchors need every of at least 1, and "
                "the other kinds take none"
            )
        if (self.kind == "interval") != (self.interval is not None):
            raise InputError(
                f"guidance {self.kind!r} with interval {self.interval}: only 'interval' takes one, and needs it"
            )

    def twice(self, schedule: Schedule) -> np.ndarray:
        """bool ``[steps]``: which steps take two evaluations; none at w = 1, where the unguided one has no weight."""
        t = schedule.timesteps
        if self.w == 1.0 or self.kind in ("none", "guided"):
            return np.zeros(len(t), bool)
        if self.interval is None:
            return np.ones(len(t), bool)
        return (t >= self.interval[0]) & (t <= self.interval[1])

    def counts(self, schedule: Schedule) -> list[int]:
        """U-Net evaluations per image of each step."""
        if self.kind in RULES:
            return [RULES[self.kind].evaluations(i, self.every) for i in range(len(schedule))]
        return [1 + int(twice) for twice in self.twice(schedule)]

    def evaluations(self, schedule: Schedule) -> int:
        """U-Net evaluations per image."""
        return sum(self.counts(schedule))

    def settings(self) -> dict[str, Any]:
        """The fields that identify cached images."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if k != "every" or v is not None}


@torch.no_grad()
def denoise(
    predict: Predict, schedule: Schedule, x: Tensor, text: Tensor, empty: Tensor, how: Guidance,
    tick: Callable[[int], Any] | None = None,
) -> Tensor:  # fmt: skip
    """Latents ``[B, C, H, W]`` float32 from unit noise ``x``; text ``[B, tokens, D]``, empty ``[1, tokens, D]``.

    ``tick`` is called with the number of evaluations of each step, over all images.
    """
    n = len(x)
    x = x * schedule.init_scale
    w = torch.full((n,), float(how.w), device=x.device)
    rule = None
    if how.kind in RULES:
        rule = RULES[how.kind](Evaluate(predict, text, empty, how.w), len(schedule), how.every)
    for i, count in enumerate(how.counts(schedule)):
        t = torch.full((n,), int(schedule.timesteps[i]), device=x.device)
        if rule is not None:
            output = rule(i, x, t, float(schedule.image_scale[i]), float(schedule.noise_scale[i]))
        elif count == 2:
            both = predict(torch.cat([x, x]), t.repeat(2), torch.cat([empty.expand_as(text), text]), w.repeat(2))
            without, with_text = both.chunk(2)
            output = without + how.w * (with_text - without)
        else:
            output = predict(x, t, text, w)
        x = float(schedule.x_scale[i]) * x + float(schedule.output_scale[i]) * output
        if tick is not None:
            tick(n * count)
    return x


class Sampler:
    """A Stable-Diffusion folder with a batched sampling loop, reduced to what measurements need.

    Noise is generated on the CPU, so that an image starts from the same noise on every device.

    Args:
        unet: safetensors of a fine-tuned U-Net that replaces the folder's.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, folder: Path, unet: Path | None = None, device: str = "cpu") -> None:
        from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        if not (folder / "model_index.json").is_file():
            raise InputError(f"{folder} is not a diffusers pipeline folder: model_index.json is missing")
        index = json.loads((folder / "model_index.json").read_text())
        vae_class = AutoencoderTiny if index["vae"][1] == "AutoencoderTiny" else AutoencoderKL

        def load(kind: Any, part: str) -> Any:
            return kind.from_pretrained(folder / part).float().eval().requires_grad_(False).to(device)

        self.unet, self.vae = load(UNet2DConditionModel, "unet"), load(vae_class, "vae")
        self.text_encoder = load(CLIPTextModel, "text_encoder")
        self.device = device
        if device != "cpu":  # as exact as on a CPU; PyTorch's convolutions use TensorFloat-32 by default
            torch.backends.cudnn.allow_tf32 = False
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.schedule_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        if unet is not None:
            from safetensors.torch import load_file

            self.unet.load_state_dict(load_file(unet))
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self.bfloat16 = False
        self._states: dict[str, Tensor] = {}

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Text states ``[N, tokens, D]``, computed once per prompt."""
        new = sorted(set(prompts) - set(self._states))
        for i in range(0, len(new), BATCH):
            some = new[i : i + BATCH]
            longest = self.tokenizer.model_max_length
            ids = self.tokenizer(some, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
            self._states.update(zip(some, self.text_encoder(ids.input_ids.to(self.device))[0], strict=True))
        return torch.stack([self._states[p] for p in prompts])

    def predict(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        """The folder's own U-Net, eager; under autocast if ``choose_precision`` selected it."""
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.unet(x, t, text).sample.float()

    def draw(
        self, rows: Sequence[Ask], predict: Predict, how: Guidance, schedule: Schedule, batch: int = BATCH,
        tick: Callable[[int], Any] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Sample images, uint8 ``[N, H, W, 3]``."""
        size = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, size, size)
        done = []
        for i in range(0, len(rows), batch):
            some = rows[i : i + batch]
            x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(a.seed)) for a in some])
            x, text = x.to(self.device), self.text([a.prompt for a in some])
            done.append(self.decode(denoise(predict, schedule, x, text, self.text([""]), how, tick)))
        return np.concatenate(done)

    def schedule(self, steps: int) -> Schedule:
        """DDIM with η = 0 on the folder's noise schedule."""
        return ddim(self.schedule_config, steps)

    def __call__(self, rows: Sequence[Ask], w: float, steps: int, batch: int = BATCH, note: str = "") -> np.ndarray:
        """Sample images, uint8 ``[N, H, W, 3]``, by CFG with the folder's own U-Net (without guidance at w = 1)."""
        how, schedule = Guidance("cfg", w), self.schedule(steps)
        total = len(rows) * how.evaluations(schedule)
        with tqdm(total=total, desc=note or f"w = {w:g}", mininterval=5, disable=not note) as bar:
            return self.draw(rows, self.predict, how, schedule, batch, bar.update)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        out = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return out.div(2).add(0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def reconstruct(self, pixels: np.ndarray) -> np.ndarray:
        """Encode and decode images: the best quality that any U-Net could reach."""
        out = []
        for i in range(0, len(pixels), BATCH):
            x = torch.from_numpy(pixels[i : i + BATCH]).permute(0, 3, 1, 2).to(self.device).float().div(127.5).sub(1)
            code = self.vae.encode(x)
            z = code.latents if hasattr(code, "latents") else code.latent_dist.mode()
            out.append(self.decode(z * self.vae.config.scaling_factor))
        return np.concatenate(out)

    def choose_precision(self, rows: Sequence[Ask], steps: int) -> dict[str, Any]:
        """Use bfloat16 if the processor supports it and images at the strongest guidance show no difference.

        A GPU always uses float32, which takes only seconds for the bundled model.
        """
        if self.device != "cpu" or not multiplies("bfloat16"):
            return {"precision": "float32", "bfloat16_psnr_db": None}
        self.bfloat16 = False
        exact = self(rows[:8], max(SCALES), steps)
        self.bfloat16 = True
        level = float(fidelity.psnr(self(rows[:8], max(SCALES), steps), exact).mean())
        self.bfloat16 = level >= SAME_TO_THE_EYE
        return {"precision": "bfloat16" if self.bfloat16 else "float32", "bfloat16_psnr_db": round(level, 2)}

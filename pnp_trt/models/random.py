"""Stable Diffusion's architectures with seeded random weights, for work where the images do not matter.

Weights are generated in float16, one tensor at a time, so that SD 1.5 takes 1.7 GB and not twice 3.4.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from ..assets import ROOT as ASSETS
from ..bundle.store import digest
from ..errors import InputError
from .architectures import architectures, of_family
from .networks import quiet_libraries
from .specs import TextEncoderSpec
from .teacher import BaseModel, random_unet_config

#: to be changed when the same seed yields other weights
RECIPE = 1
SEED = 0
GUIDE = "tiny"


@dataclass
class RandomBase(BaseModel):
    """A teacher without files.

    Attributes:
        configs: config of each network (``unet``, the text encoders, ``vae``), by name.
        seed: seed of the U-Net's weights; the other networks are the same for all seeds, so that a base with another
            seed is a fine-tune.
    """

    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = SEED

    def own_config(self, network: str) -> dict[str, Any]:
        return self.configs[network]

    def check(self) -> None:
        """Do nothing, as no weight is read from a file."""

    def own_fingerprint(self) -> dict[str, str]:
        parts = {n: digest([RECIPE, self._seed(n), config]) for n, config in self.configs.items()}
        return {**parts, "all": digest(parts)}

    def unet(self) -> Any:
        """``UNet2DConditionModel`` in float16, frozen."""
        from diffusers import UNet2DConditionModel

        return self._instantiate(UNet2DConditionModel, "unet")

    def text_encoder(self, spec: TextEncoderSpec | None = None) -> Any:
        """A text encoder in float16, frozen."""
        import transformers

        spec = spec or self.text_specs[0]
        # allocated and not on the meta device, because its position ids are in a buffer
        config = transformers.CLIPTextConfig(**self.config(spec.name))
        return _fill(getattr(transformers, spec.kind)(config).half(), spec.name)

    def own_vae(self) -> Any:
        """The autoencoder in float16, frozen."""
        import diffusers

        return self._instantiate(getattr(diffusers, self.config("vae")["_class_name"]), "vae")

    def _instantiate(self, kind: Any, network: str) -> Any:
        import torch

        quiet_libraries()
        with torch.device("meta"):
            module = kind.from_config(self.config(network))
        return _fill(module, network, seed=self._seed(network))

    def _seed(self, network: str) -> int:
        return self.seed if network == "unet" else SEED

    def random_guide(self, name: str) -> dict[str, str] | None:
        kind = _guide_kind(name)
        return {"name": f"random-{kind}", "sha256": digest([RECIPE, SEED, kind, self.configs["unet"]])}

    def make_guide(self, name: str, unet: Any) -> Any:
        """Create a guide of a known kind in float32, whose residuals are not zero."""
        import torch

        guide = self.guide_class(name).from_unet(unet)
        return _fill(guide, f"guide-{_guide_kind(name)}", torch.float32)

    def guide_class(self, name: str) -> Any:
        from .guides import GUIDES

        kind = _guide_kind(name)
        if kind not in GUIDES:
            raise InputError(f"guide '{name}' is not known for {self.name}; known: {', '.join(GUIDES)}, none")
        return GUIDES[kind]


def random_base(name: str) -> RandomBase:
    """Return ``random:sd15``, ``random:sd21`` or ``random:sdxl``; ``random:sd15#2`` has the U-Net of seed 2.

    Raises:
        InputError: for another name.
    """
    random_unet_config(name)
    name, hash_, seed = name.partition("#")
    if hash_ and not seed.isdecimal():
        raise InputError(f"the seed of '{name}#{seed}' is not a whole number; write {name}#2")
    architecture = next(a for a in architectures() if a.name == name.removeprefix("random:"))
    # the bundled model has Stable Diffusion's own tokenizer
    base: RandomBase = of_family(RandomBase, architecture.family)(
        name + hash_ + seed, ASSETS / "emoji", configs=architecture.configs, seed=int(seed or SEED)
    )
    return base


def _guide_kind(name: str) -> str:
    return GUIDE if name == "auto" else name


def _fill(module: Any, name: str, dtype: Any = None, seed: int = SEED) -> Any:
    """Fill all weights: seeded values of unit gain for matrices and kernels, ones for scales, zeros for biases."""
    import torch

    replacements: dict[Any, Any] = {}
    for prefix, part in module.named_modules():
        for key, old in list(part.named_parameters(recurse=False)):
            if old in replacements:  # tied weights stay tied
                part._parameters[key] = replacements[old]
                continue
            tensor = torch.empty(old.shape, dtype=dtype or torch.float16)
            if old.ndim < 2:
                tensor.fill_(0.0 if key == "bias" else 1.0)
            else:
                seed_bytes = hashlib.sha256(f"{seed}:{name}.{prefix}.{key}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(seed_bytes, "little") >> 1)
                tensor.normal_(std=old[0].numel() ** -0.5, generator=generator)
            replacements[old] = part._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
    if unmade := [n for n, b in module.named_buffers() if b.is_meta]:
        raise InputError(f"{name} cannot have random weights: its buffer {unmade[0]} must come from a checkpoint")
    return module.eval().requires_grad_(False)

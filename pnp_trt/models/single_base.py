"""A base model that is one checkpoint file.

The shapes of its U-Net determine its architecture.  For the bundled model's architecture, networks that are missing
from the file are taken from the bundled model.  For the others (Stable Diffusion 1, 2 and XL), every network must be in
the file, and only configs, tokenizers and the noise schedule are provided by this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..assets import ROOT as ASSETS
from ..bundle.store import digest
from ..errors import InputError
from .architectures import Architecture, architectures, of_family
from .files import files_sha256
from .folders import check_unet
from .networks import check_finite, empty, filled, module_keys
from .noise import Noise
from .single_file import SingleFile, read_single_file
from .specs import TextEncoderSpec
from .state_dicts import check_fits
from .teacher import BaseModel


@dataclass
class SingleFileBase(BaseModel):
    """A teacher whose U-Net is in one file, with or without its text encoders and VAE.

    Attributes:
        single: the file's keys, sorted into networks.
        unet_only: whether everything but the U-Net is ignored, at the user's request.
        architecture: the file's architecture; None for the bundled model's.
    """

    single: SingleFile | None = None
    unet_only: bool = False
    architecture: Architecture | None = field(default=None, repr=False)

    @classmethod
    def of(cls, path: Path, name: str) -> SingleFileBase:
        """Create the base model of a file, of which only the header is read.

        Raises:
            InputError: if it is not a safetensors file, or has no U-Net or an unsupported one.
        """
        single = read_single_file(path)
        architecture = _architecture(single)
        kind = cls if architecture is None else of_family(cls, architecture.family)
        base: SingleFileBase = kind(name, ASSETS / "emoji", path, single=single, architecture=architecture)
        return base

    @property
    def _file(self) -> SingleFile:
        assert self.single is not None
        return self.single

    def own_config(self, network: str) -> dict[str, Any]:
        return super().own_config(network) if self.architecture is None else self.architecture.configs[network]

    def scheduler_file(self) -> Path:
        return super().scheduler_file() if self.architecture is None else self.architecture.scheduler

    def check_parts(self) -> None:
        """Raise ``InputError`` if parts of the file are missing or would not be used.

        With ``unet_only``, unused parts are ignored.
        """
        names = [*(spec.name for spec in self.text_specs), "vae"]
        lacking = [n for n in names if self.unet_only or n not in self._file.parts]
        if self.architecture is not None and lacking:
            what = "--unet-only leaves out its" if self.unet_only else "has no"
            raise InputError(
                f"{self.name} is a checkpoint of {self.architecture.name} and {what} {', '.join(lacking)}; pass the "
                "complete checkpoint, or plug its U-Net into an engine of its base: pnp-trt plug ENGINE --base FILE"
            )
        if not self.unet_only:
            what = "the bundled model" if self.architecture is None else f"a model of {self.architecture.name}"
            self._file.refuse_unused({n: self.config(n) for n in names}, what)

    def check_noise(self, chosen: Noise) -> None:
        """Refuse a file that does not state its prediction type if its architecture exists with two of them.

        Args:
            chosen: the user's options.

        Raises:
            InputError: if neither the file nor the user states it.
        """
        stated = self._file.noise.prediction_type or chosen.prediction_type
        if self.architecture is not None and stated is None and "prediction_type" not in self.scheduler_config():
            raise InputError(
                f"{self.name} is a checkpoint of {self.architecture.name} and does not state what its U-Net predicts; "
                "pass --prediction-type v_prediction (Stable Diffusion 2 and 2.1 of 768 pixels) or epsilon (of 512)"
            )

    def _uses(self, part: str) -> bool:
        return part in self._file.parts and not self.unet_only

    def scheduler_config(self) -> dict[str, Any]:
        return self._file.noise.over(super().scheduler_config())

    def unet(self) -> Any:
        from diffusers import UNet2DConditionModel

        self.check_parts()
        self.check_configs()
        return self._filled(UNet2DConditionModel, "unet", self._file.weights("unet", self.config("unet")), "U-Net")

    def text_encoder(self, spec: TextEncoderSpec | None = None) -> Any:
        import transformers

        self.check_parts()
        spec = spec or self.text_specs[0]
        if not self._uses(spec.name):
            return super().text_encoder(spec)
        weights = self._file.weights(spec.name, self.config(spec.name))
        return self._filled(getattr(transformers, spec.kind), spec.name, weights, spec.title)

    def own_vae(self) -> Any:
        import diffusers

        self.check_parts()
        if not self._uses("vae"):
            return super().own_vae()
        config = self.config("vae")
        return self._filled(getattr(diffusers, config["_class_name"]), "vae", self._file.weights("vae", config), "VAE")

    def _filled(self, kind: Any, part: str, weights: dict[str, Any], what: str) -> Any:
        config = self.config(part)
        module = empty(kind, config, self.name)
        weights = module_keys(weights, module)
        whose = "the bundled model's" if self.architecture is None else f"that of {self.architecture.name}"
        check_fits(module.state_dict(), weights, f"the {what} in {self.name}", whose)
        single = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        return check_finite(filled(module, config, single), self.name).eval().requires_grad_(False)

    def own_fingerprint(self) -> dict[str, str]:
        if not self._hashes:
            file_hash = files_sha256([self._file.path])
            names = ["unet", *(spec.name for spec in self.text_specs), "vae"]
            if self.architecture is None:
                parts = {k: v for k, v in super().own_fingerprint().items() if k != "all"}
                parts |= {n: file_hash for n in names if self._uses(n)}
            else:
                parts = dict.fromkeys(names, file_hash)
            self._hashes = parts | {"all": digest(parts)}
        return self._hashes


def _architecture(file: SingleFile) -> Architecture | None:
    """The known architecture of a file's U-Net; None for the bundled model's and for unknown ones.

    Raises:
        InputError: for a U-Net with other inputs, such as for inpainting, or a refiner.
    """
    marks = _marks_of(file)
    check_unet(
        {"in_channels": marks["in"], "out_channels": marks["out"],
         "time_cond_proj_dim": marks["guided"]},
        {"latent_channels": marks["out"]}, str(file.path),
    )  # fmt: skip
    if "text_encoder_2" in file.parts and "text_encoder" not in file.parts:
        raise InputError(
            f"{file.path} is SDXL's refiner: it has only the second text encoder and refines the base model's "
            "images; pass the base model's file"
        )
    identity = marks["in"], marks["width"], marks["text"], marks["added"]
    return next((a for a in architectures() if _marks(a.configs["unet"]) == identity), None)


def _marks(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Entries that identify a U-Net's architecture: channels, first width, text width, width of added conditions."""
    return (
        config["in_channels"], config["block_out_channels"][0], config["cross_attention_dim"],
        config.get("projection_class_embeddings_input_dim"),
    )  # fmt: skip


def _marks_of(file: SingleFile) -> dict[str, Any]:
    """Channels and widths of a file's U-Net, from the shapes of its weights."""
    keys = file.parts["unet"].keys

    def shape(*names: str) -> tuple[int, ...]:
        return next((file.shapes[keys[n]] for n in names if n in keys), ())

    first = shape("conv_in.weight", "input_blocks.0.0.weight")
    last = shape("conv_out.weight", "out.2.weight")
    guided = shape("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight")
    added = shape("add_embedding.linear_1.weight", "label_emb.0.0.weight")
    text = next((file.shapes[old] for new, old in keys.items() if new.endswith("attn2.to_k.weight")), ())
    if len(first) != 4 or not last:
        return {"in": 4, "out": 4, "width": None, "text": None, "added": None, "guided": None}
    return {
        "in": first[1], "out": last[0], "width": first[0], "text": text[-1] if text else None,
        "added": added[-1] if added else None, "guided": guided[-1] if guided else None,
    }  # fmt: skip

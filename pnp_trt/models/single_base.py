"""A base model that is one checkpoint file; what the file lacks is the bundled model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..assets import ROOT as ASSETS
from ..bundle.store import digest
from .convert import text_weights, unet_weights, vae_weights
from .files import files_sha256
from .networks import check_finite, load_network
from .single_file import SingleFile, read_single_file
from .state_dicts import check_fits
from .teacher import BaseModel


@dataclass
class SingleFileBase(BaseModel):
    """A teacher whose U-Net, and text encoder and VAE where it has them, are in one file.

    Attributes:
        single: the file's sorted keys.
        unet_only: whether everything but the U-Net is left out, as the user requests.
    """

    single: SingleFile | None = None
    unet_only: bool = False

    @classmethod
    def of(cls, path: Path, name: str) -> SingleFileBase:
        """The base model of a file, its header read.

        Raises:
            InputError: if it is not a safetensors file, or holds no U-Net.
        """
        return cls(name, ASSETS / "emoji", path, single=read_single_file(path))

    @property
    def _file(self) -> SingleFile:
        assert self.single is not None
        return self.single

    def check_parts(self) -> None:
        """Raise ``InputError`` that names what of the file would not be used, unless only the U-Net is wanted."""
        if not self.unet_only:
            self._file.refuse_unused({n: self.config(n) for n in ("text_encoder", "vae")}, "the bundled model")

    def _uses(self, part: str) -> bool:
        return part in self._file.parts and not self.unet_only

    def scheduler_config(self) -> dict[str, Any]:
        return self._file.noise.over(super().scheduler_config())

    def unet(self) -> Any:
        from diffusers import UNet2DConditionModel

        self.check_parts()
        unet = load_network(UNet2DConditionModel, self.folder / "unet")
        return self._filled(unet, unet_weights(self._file, self.config("unet")), "U-Net")

    def text_encoder(self) -> Any:
        self.check_parts()
        module = super().text_encoder()
        if not self._uses("text_encoder"):
            return module
        prefix = "text_model." if any(k.startswith("text_model.") for k in module.state_dict()) else ""
        weights = text_weights(self._file, self.config("text_encoder"))
        return self._filled(module, {prefix + k: v for k, v in weights.items()}, "text encoder")

    def vae(self) -> Any:
        self.check_parts()
        module = super().vae()
        return self._filled(module, vae_weights(self._file, self.config("vae")), "VAE") if self._uses("vae") else module

    def _filled(self, module: Any, weights: dict[str, Any], what: str) -> Any:
        own = module.state_dict()
        check_fits(own, weights, f"the {what} in {self.name}", "the bundled model's")
        module.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})
        return check_finite(module, self.name).eval().requires_grad_(False)

    def fingerprint(self) -> dict[str, str]:
        if not self._hashes:
            own = files_sha256([self._file.path])
            parts = {k: v for k, v in super().fingerprint().items() if k != "all"}
            parts |= {n: own for n in ("text_encoder", "vae") if self._uses(n)}
            self._hashes = parts | {"all": digest(parts)}
        return self._hashes

"""An autoencoder that replaces a base model's own, such as one that is fixed for half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.inputs import is_file, is_folder
from .convert import converted_vae
from .files import files_sha256, read_weights, weight_files
from .networks import empty, filled, load_network, network_config
from .state_dicts import check_fits

_KINDS = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class OtherVae:
    """A diffusers folder of an autoencoder, or a file with its weights, which is then used with the base's config.

    Attributes:
        path: a folder with ``config.json``, or a ``.safetensors`` file with diffusers' or the original names.
    """

    path: Path

    @classmethod
    def find(cls, path: Path) -> OtherVae:
        """Resolve the value of ``--vae``; for the folder of a complete model, use its autoencoder.

        Raises:
            InputError: if it is neither such a folder nor a safetensors file.
        """
        if is_folder(path):
            folder = path if is_file(path / "config.json") else path / "vae"
            if is_file(folder / "config.json"):
                weight_files(folder)
                return cls(folder)
        elif path.suffix == ".safetensors" and is_file(path):
            return cls(path)
        raise InputError(f"--vae is '{path}'; pass an autoencoder's diffusers folder or a .safetensors file")

    def config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The autoencoder's config.

        Args:
            own: config of the autoencoder that is replaced.

        Raises:
            InputError: if the two have different latents.
        """
        if not self.path.is_dir():
            return dict(own)
        config = network_config(self.path)
        if config.get("_class_name", _KINDS[0]) not in _KINDS:
            raise InputError(f"--vae {self.path} is of class {config['_class_name']}; known: {', '.join(_KINDS)}")
        for key in ("latent_channels", "scaling_factor"):
            if (value := config.get(key)) is not None and own.get(key) is not None and value != own[key]:
                raise InputError(
                    f"--vae {self.path} has {key} = {value}, but the base's autoencoder has {own[key]}; use one with "
                    "the same latents"
                )
        for key in ("latents_mean", "latents_std"):
            if config.get(key) != own.get(key):
                raise InputError(
                    f"--vae {self.path} has {key} = {config.get(key)}, but the base's autoencoder has {own.get(key)}; "
                    "use one with the same latents"
                )
        return config

    def load(self, own: Mapping[str, Any]) -> Any:
        """Load the autoencoder in float32; arguments and errors as in :meth:`config`, and for damaged files."""
        import diffusers

        config = self.config(own)
        kind = getattr(diffusers, config.get("_class_name", _KINDS[0]))
        if self.path.is_dir():
            return load_network(kind, self.path)
        weights = converted_vae(read_weights([self.path]), config, self.path)
        module = empty(kind, config, str(self.path))
        check_fits(module.state_dict(), weights, str(self.path), "the base's autoencoder")
        return filled(module, config, {k: v.float() for k, v in weights.items()})

    def sha256(self) -> str:
        """Hash of the weights."""
        return files_sha256(weight_files(self.path) if self.path.is_dir() else [self.path])

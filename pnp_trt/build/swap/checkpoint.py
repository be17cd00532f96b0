"""Load fine-tunes: a diffusers folder, a folder with only a U-Net, or one safetensors file with any known key names.

A fine-tune may lack networks: the bundle keeps its own.  Parts that the bundle cannot use are refused.  Weights are
memory-mapped in their stored type, so that a checkpoint of Stable Diffusion's size needs no additional memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...models.bases import resolve
from ...models.configs import check_same_network, check_same_text
from ...models.files import files_sha256, read_json, read_weights, weight_files
from ...models.folders import check_unet
from ...models.networks import check_finite, module_keys, quiet_libraries
from ...models.noise import Noise
from ...models.other_vae import OtherVae
from ...models.scheduler import base_scheduler, scheduler_record
from ...models.single_file import SingleFile, read_single_file
from ...models.specs import TextEncoderSpec
from ...models.state_dicts import check_fits
from ...models.teacher import BaseModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class FineTune:
    """A fine-tune whose weights have not been read.

    Attributes:
        name: the user's name for it.
        files: safetensors files by network; the bundle keeps networks that are missing here.
        folders: folder of a network's ``config.json``, by network.
        base: the complete model if the fine-tune is one; else None.
        single: the sorted keys if the fine-tune is one file; else None.
        unet_only: whether the user requested only the U-Net.
        takes_vae: whether to use the fine-tune's autoencoder, if it has one.
        other_vae: an autoencoder that replaces the fine-tune's.
    """

    name: str
    files: dict[str, list[Path]]
    folders: dict[str, Path]
    base: BaseModel | None = None
    single: SingleFile | None = None
    unet_only: bool = False
    takes_vae: bool = True
    other_vae: OtherVae | None = None

    def with_vae(self, other: OtherVae | None) -> FineTune:
        """A copy with another autoencoder instead of its own; without any autoencoder if ``other`` is None."""
        return replace(self, takes_vae=False, other_vae=other)

    def source_of(self, part: str) -> str:
        """Origin of the weights of ``unet``, a text encoder or ``vae``, for messages."""
        return f"--vae {self.other_vae.path}" if part == "vae" and self.other_vae is not None else self.name

    def fingerprint(self) -> dict[str, str]:
        """Hash of each network's weights, as in ``BaseModel.fingerprint``."""
        if self.base is None:
            own = {part: files_sha256(files) for part, files in self.files.items()}
        else:
            own = {k: v for k, v in self.base.fingerprint().items() if k == "unet" or not self.unet_only}
        parts = {k: v for k, v in own.items() if k != "all" and (k != "vae" or self.takes_vae)}
        return parts | ({} if self.other_vae is None else {"vae": self.other_vae.sha256()})

    def configs_sha256(self) -> str | None:
        """Hash of the config entries that affect the computation; None if only a U-Net is used."""
        return None if self.base is None or self.unet_only else self.base.configs_sha256()

    def config(self, part: str) -> dict[str, Any] | None:
        """The fine-tune's config of a network; None if it has none."""
        if part in self.folders:
            return read_json(self.folders[part] / "config.json")
        return self.base.config(part) if self.base is not None else None

    def scheduler(self, engine: Mapping[str, Any], chosen: Noise) -> dict[str, Any]:
        """The scheduler record of the new bundle when this fine-tune is plugged into an engine.

        Args:
            engine: the engine's record, which is used if the fine-tune has no scheduler.
            chosen: the user's options.
        """
        beside = self.folders["unet"].parent if "unet" in self.folders else None
        if self.base is not None:
            own: Mapping[str, Any] = base_scheduler(self.base)
        elif beside is not None and (beside / "scheduler" / "scheduler_config.json").is_file():
            own = base_scheduler(BaseModel(self.name, beside))  # the folder is the U-Net's inside a complete model
        else:
            own = engine
        stated = self.single.noise if self.single is not None else Noise()
        return scheduler_record(own, stated, chosen)

    def check_parts(
        self, configs: Mapping[str, Mapping[str, Any]], specs: Sequence[TextEncoderSpec], what: str
    ) -> None:
        """Refuse parts that the engine cannot use, and configs that compute differently with the same weights.

        Args:
            configs: configs of the engine's networks.
            specs: the engine's text encoders.
            what: the engine, for messages.

        Raises:
            InputError: naming the parts, or the config entry with both values.
        """
        if self.single is not None and not self.unet_only:
            self.single.refuse_unused(configs, what)
        if self.base is not None and not self.unet_only:
            if self.base.text_specs != tuple(specs):
                raise InputError(
                    f"{self.name} has {_encoders(self.base.text_specs)}, but {what} has {_encoders(specs)}; build it "
                    "instead"
                )
            for spec in specs:
                check_same_text(self.base.config(spec.name), configs[spec.name], self.name, what, spec.kind)
        self._check_vae(configs["vae"], what)

    def unet(self, config: dict[str, Any], what: str) -> Any:
        """A frozen ``UNet2DConditionModel`` of the bundle's architecture with this fine-tune's weights.

        Args:
            config: config of the bundle's U-Net.
            what: the bundle, for messages.

        Raises:
            InputError: if weights are missing, left over or of another shape, a file is damaged, or the configs show
                that the two networks compute differently.
        """
        from diffusers import UNet2DConditionModel

        own = self.config("unet") or config
        check_unet(own, {"latent_channels": config["in_channels"]}, self.name, (None, "text_time"))
        check_same_network(UNet2DConditionModel, own, config, self.name, what)
        if self.single is not None:
            weights = self.single.weights("unet", config)
        elif "unet" in self.files:
            weights = read_weights(self.files["unet"])
        else:  # without files: random weights
            assert self.base is not None
            return self.base.unet()
        return _filled(UNet2DConditionModel, own, weights, self.name, what)

    def text_encoder(self, spec: TextEncoderSpec, config: dict[str, Any], what: str) -> Any:
        """A frozen text encoder; arguments and errors as for ``unet``.

        Args:
            spec: which of the engine's text encoders to load.
        """
        if self.single is None:
            assert self.base is not None
            check_same_text(self.base.config(spec.name), config, self.name, what, spec.kind)
            return self.base.text_encoder(spec)
        import transformers

        quiet_libraries()
        module = getattr(transformers, spec.kind)(transformers.CLIPTextConfig(**config))
        own = module.state_dict()
        weights = module_keys(self.single.weights(spec.name, config), module)
        check_fits(own, weights, f"the {spec.title} in {self.name}", f"that of {what}")
        module.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})
        return module.eval().requires_grad_(False)

    def vae(self, config: dict[str, Any], what: str) -> Any:
        """The frozen autoencoder; arguments and errors as for ``unet``."""
        self._check_vae(config, what)
        if self.other_vae is not None:
            return check_finite(self.other_vae.load(config), str(self.other_vae.path)).eval().requires_grad_(False)
        if self.single is None:
            assert self.base is not None
            return self.base.vae()
        import diffusers

        kind = getattr(diffusers, config.get("_class_name", "AutoencoderKL"))
        return _filled(kind, config, self.single.weights("vae", config), f"the VAE in {self.name}", what)

    def _check_vae(self, config: Mapping[str, Any], what: str) -> None:
        """Refuse an autoencoder that computes differently from the engine's, whose config is ``config``."""
        if self.other_vae is not None:
            name, own = self.source_of("vae"), self.other_vae.config(config)
            advice = "build it with this autoencoder instead: pnp-trt build --vae"
        elif self.base is not None and self.takes_vae and not self.unet_only:
            name, own = f"the VAE of {self.name}", self.base.config("vae")
            advice = "pass --unet-only to keep the engine's, or build it instead"
        else:
            return
        if own == config:
            return
        import diffusers

        kinds = [c.get("_class_name", "AutoencoderKL") for c in (own, config)]
        if kinds[0] != kinds[1]:
            raise InputError(f"{name} is an {kinds[0]}, but {what} has an {kinds[1]}; {advice}")
        whose = name if self.other_vae is not None else self.name
        check_same_network(getattr(diffusers, kinds[0]), own, config, whose, what)


def _encoders(specs: Sequence[TextEncoderSpec]) -> str:
    return "one text encoder" if len(specs) == 1 else f"{len(specs)} text encoders"


def find(name: str, unet_only: bool = False) -> FineTune:
    """Find a fine-tune by name; no heavy imports, and no weights are read.

    Args:
        name: a diffusers folder, a folder with only a U-Net, a ``.safetensors`` file, or any base model's name.
        unet_only: use only the U-Net.

    Raises:
        InputError: if it does not exist, or a file is not a safetensors file or contains no U-Net.
    """
    path = Path(name)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise InputError(f"no file {path}; --base takes a diffusers folder, a .safetensors file, or a bundled name")
        single = read_single_file(path)
        parts = ["unet"] if unet_only else list(single.parts)
        return FineTune(name, {part: [path] for part in parts}, {}, single=single, unet_only=unet_only)
    if path.is_dir() and (path / "config.json").is_file() and not (path / "unet").is_dir():
        return FineTune(name, {"unet": weight_files(path)}, {"unet": path}, unet_only=unet_only)
    base = resolve(name)
    files: dict[str, list[Path]] = {}
    if base.unet_file is not None:
        files["unet"] = [base.unet_file]
    elif not name.startswith("random:"):
        files["unet"] = weight_files(base.folder / "unet")
    return FineTune(name, files, {}, base, unet_only=unet_only)


def _filled(kind: Any, config: Mapping[str, Any], weights: dict[str, Tensor], name: str, what: str) -> Any:
    """A diffusers network that uses ``weights`` without copying them."""
    import torch

    quiet_libraries()
    with torch.device("meta"):
        module = kind.from_config(dict(config))
    check_fits(module.state_dict(), weights, name, what)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)

"""Fine-tunes as they come: a diffusers folder, a U-Net's folder, one safetensors file of diffusers' or of LDM's keys.

A fine-tune need not hold every network: what it lacks stays as the bundle has it.  Weights are mapped from their files
and not copied, in the type that they are stored in, so that a checkpoint of Stable Diffusion's size costs no memory
of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..models.base import (
    BaseModel,
    check_same_weights,
    files_sha256,
    quiet_libraries,
    resolve,
    weight_files,
)

if TYPE_CHECKING:
    from torch import Tensor

#: networks of a checkpoint, as manifests' hashes name them
PARTS = ("unet", "text_encoder", "vae")
#: what original checkpoints (CompVis' latent diffusion) put before each network's keys
LDM = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer.", "vae": "first_stage_model."}
#: entries of a config that change no arithmetic of a graph whose size is fixed
_FREE = ("sample_size", "force_upcast", "out_shape")


@dataclass
class FineTune:
    """A fine-tune that was found, none of its weights read.

    Attributes:
        name: as the user gave it.
        files: safetensors files by network; a network that is not there stays as the bundle has it.
        folders: where a network's own ``config.json`` is, by network.
        base: the whole model where the fine-tune is one; else None.
        ldm: whether the keys are those of original checkpoints.
    """

    name: str
    files: dict[str, list[Path]]
    folders: dict[str, Path]
    base: BaseModel | None = None
    ldm: bool = False

    def fingerprint(self) -> dict[str, str]:
        """Hash of each network's weights, as ``BaseModel.fingerprint`` has them."""
        if self.base is not None:
            return {k: v for k, v in self.base.fingerprint().items() if k != "all"}
        return {part: files_sha256(files) for part, files in self.files.items()}

    def config(self, part: str) -> dict[str, Any] | None:
        """A network's own config; None where the fine-tune brings none."""
        if part in self.folders:
            path = self.folders[part] / "config.json"
            try:
                held: dict[str, Any] = json.loads(path.read_text())
            except (OSError, ValueError) as e:
                raise InputError(f"{path} is not readable as JSON ({e}); fetch it again") from None
            return held
        return self.base.config(part) if self.base is not None else None

    def unet(self, config: dict[str, Any], what: str) -> Any:
        """``UNet2DConditionModel`` of the bundle's architecture with this fine-tune's weights, frozen.

        Args:
            config: of the bundle's U-Net.
            what: the bundle, for messages.

        Raises:
            InputError: if weights are missing, left over or of another shape, a file is damaged, or the configs say
                that the two networks compute differently.
        """
        from diffusers import UNet2DConditionModel

        own = self.config("unet") or config
        _check_same_config(UNet2DConditionModel, own, config, self.name, what)
        if "unet" not in self.files:  # without files: random weights
            assert self.base is not None
            return self.base.unet()
        weights = read(self.files["unet"])
        if self.ldm:
            from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

            weights = _converted(weights, LDM["unet"], lambda w: convert_ldm_unet_checkpoint(w, config=config))
        return _filled(UNet2DConditionModel, own, weights, self.name, what)

    def text_encoder(self, config: dict[str, Any], what: str) -> Any:
        """``CLIPTextModel``, frozen; arguments and errors as of ``unet``."""
        if not self.ldm:
            assert self.base is not None
            _check_same_text(self.base.config("text_encoder"), config, self.name, what)
            return self.base.text_encoder()
        from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint
        from transformers import CLIPTextConfig, CLIPTextModel

        quiet_libraries()
        module = CLIPTextModel(CLIPTextConfig(**config))
        own = module.state_dict()
        weights = convert_ldm_clip_checkpoint(read(self.files["text_encoder"]))
        prefix = "" if any(k.startswith("text_model.") for k in own) else "text_model."
        found = {k.removeprefix(prefix): v for k, v in weights.items() if not k.endswith("position_ids")}
        check_same_weights(own, found, f"the text encoder in {self.name}", f"that of {what}")
        module.load_state_dict({k: v.to(own[k].dtype) for k, v in found.items()})
        return module.eval().requires_grad_(False)

    def vae(self, config: dict[str, Any], what: str) -> Any:
        """The autoencoder, frozen; arguments and errors as of ``unet``."""
        import diffusers

        kind = getattr(diffusers, config.get("_class_name", "AutoencoderKL"))
        if not self.ldm:
            assert self.base is not None
            own = self.base.config("vae")
            if own.get("_class_name", "AutoencoderKL") != kind.__name__:
                raise InputError(f"the VAE of {self.name} is a {own['_class_name']}, {what} has an {kind.__name__}")
            _check_same_config(kind, own, config, self.name, what)
            return self.base.vae()
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        weights = read(self.files["vae"])
        weights = _converted(weights, LDM["vae"], lambda w: convert_ldm_vae_checkpoint(w, config=config))
        return _filled(kind, config, weights, self.name, what)


def find(name: str) -> FineTune:
    """The fine-tune of a name; nothing heavy is imported or read.

    Args:
        name: a diffusers folder, a folder of a U-Net alone, a ``.safetensors`` file, or any base model's name.

    Raises:
        InputError: if there is none, or a file is no safetensors.
    """
    path = Path(name)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise InputError(
                f"no file {path}; --base wants a diffusers folder, a U-Net .safetensors, or a bundled name"
            )
        keys = header(path)
        held = {part for part, prefix in LDM.items() if any(k.startswith(prefix) for k in keys)}
        if "unet" in held:
            return FineTune(name, {part: [path] for part in PARTS if part in held}, {}, ldm=True)
        if any(k.startswith(("cond_stage_model.", "conditioner.")) for k in keys):
            raise InputError(f"{path} has a text encoder of a kind that is not read; save it as a diffusers folder")
        return FineTune(name, {"unet": [path]}, {})
    if path.is_dir() and (path / "config.json").is_file() and not (path / "unet").is_dir():
        return FineTune(name, {"unet": weight_files(path)}, {"unet": path})
    base = resolve(name)
    files: dict[str, list[Path]] = {}
    if base.unet_file is not None:
        files["unet"] = [base.unet_file]
    elif list((base.folder / "unet").glob("*.safetensors")) and not name.startswith("random:"):
        files["unet"] = weight_files(base.folder / "unet")
    return FineTune(name, files, {}, base)


def header(path: Path) -> list[str]:
    """The keys of a safetensors file, from its header.

    Raises:
        InputError: if it is no safetensors file; pickled weights are not read.
    """
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(path.stat().st_size - 8, 100 << 20):
                raise ValueError("its header's length is out of range")
            return [k for k in json.loads(f.read(length)) if k != "__metadata__"]
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{path} is not a readable safetensors file ({e}); fetch it again") from None


def read(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files, mapped from the disk.

    Raises:
        InputError: if one is damaged or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    out: dict[str, Tensor] = {}
    for file in files:
        try:
            out |= load_file(file)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file} is not a readable safetensors file ({e}); fetch it again") from None
    return out


def _converted(weights: dict[str, Tensor], prefix: str, convert: Any) -> dict[str, Tensor]:
    """Original keys as diffusers'; what the converter does not know is kept, so that it is seen to be left over."""
    mine = {k: v for k, v in weights.items() if k.startswith(prefix)}
    try:
        made: dict[str, Tensor] = convert(dict(mine))
    except (KeyError, IndexError, ValueError) as e:
        raise InputError(
            f"the original checkpoint cannot be converted, {prefix}… lacks {e}; save it as a diffusers folder"
        ) from None
    taken = {v.data_ptr() for v in made.values()}
    return made | {k: v for k, v in mine.items() if v.data_ptr() not in taken}


def _filled(kind: Any, config: Mapping[str, Any], weights: dict[str, Tensor], name: str, what: str) -> Any:
    """A diffusers network whose weights are the given tensors themselves."""
    import torch

    quiet_libraries()
    with torch.device("meta"):
        module = kind.from_config(dict(config))
    check_same_weights(module.state_dict(), weights, name, what)
    if odd := [k for k, v in weights.items() if not v.is_floating_point()]:
        raise InputError(
            f"{name}: {odd[0]} has type {weights[odd[0]].dtype}, not floating point; fetch the full weights"
        )
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def _check_same_config(kind: Any, own: Mapping[str, Any], wanted: Mapping[str, Any], name: str, what: str) -> None:
    """Configs with their defaults filled in, so that one that an older version wrote is no other."""
    if own == wanted:
        return
    import torch

    quiet_libraries()
    with torch.device("meta"):
        mine, others = (dict(kind.from_config(dict(c)).config) for c in (own, wanted))
    _check_same(mine, others, name, what)


def _check_same_text(own: Mapping[str, Any], wanted: Mapping[str, Any], name: str, what: str) -> None:
    if own == wanted:
        return
    from transformers import CLIPTextConfig

    mine, others = (CLIPTextConfig(**c) for c in (own, wanted))
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "layer_norm_eps", "max_position_embeddings", "vocab_size", "eos_token_id")  # fmt: skip
    _check_same({k: getattr(mine, k) for k in keys}, {k: getattr(others, k) for k in keys}, name, what)


def _check_same(mine: Mapping[str, Any], others: Mapping[str, Any], name: str, what: str) -> None:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for key, value in others.items():
        if not key.startswith("_") and key not in _FREE and plain(mine.get(key)) != plain(value):
            raise InputError(
                f"{name} is no fine-tune of {what}: its config has {key} = {mine.get(key)!r}, not {value!r}; "
                "build it instead"
            )

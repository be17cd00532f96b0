"""Base models by name: the bundled one, its fine-tunes, diffusers folders, single U-Net files, random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import cached_sha256, digest
from ..assets import ROOT as ASSETS
from ..errors import InputError

PRESETS = Path(__file__).parent / "presets"


def bundled_bases() -> list[str]:
    """Names that need no download: the bundled model and its fine-tunes (``emoji-flat`` …)."""
    return ["emoji", *sorted(p.stem for p in (ASSETS / "fine-tunes").glob("*.safetensors"))]


def random_bases() -> list[str]:
    """Architectures that can be had with random weights, for work that needs the size alone."""
    return [f"random:{p.stem}" for p in sorted(PRESETS.glob("*.json"))]


@dataclass(frozen=True)
class Sizes:
    """What a base model's tensors measure.

    Attributes:
        latent: channels, height and width of a latent.
        text_width: width of a text state.
        vocabulary: number of token ids.
        factor: image pixels to a latent's.
        multiple: what a picture's height and width are multiples of, so that the U-Net halves them without rest.
    """

    latent: tuple[int, int, int]
    text_width: int
    vocabulary: int
    factor: int
    multiple: int


@dataclass
class BaseModel:
    """A teacher: its networks (loaded on demand) and where its files are.

    Attributes:
        name: as the user gave it.
        folder: a diffusers folder that holds everything but, possibly, the U-Net's weights.
        unet_file: weights that replace the folder's own U-Net (a fine-tune), or None.
    """

    name: str
    folder: Path
    unet_file: Path | None = None
    _hashes: dict[str, str] = field(default_factory=dict)

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's config without diffusers' private keys."""
        config = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        return {k: v for k, v in config.items() if not k.startswith("_")}

    def scheduler_class(self) -> str | None:
        """The class of diffusers that the scheduler's config names, None where it names none."""
        held = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text()).get("_class_name")
        return None if held is None else str(held)

    def unet(self) -> Any:
        """``UNet2DConditionModel`` in float32, frozen."""
        from diffusers import UNet2DConditionModel

        unet = _load(UNet2DConditionModel, self.folder / "unet")
        if self.unet_file is not None:
            load_unet_weights(unet, self.unet_file)
        return check_finite(unet, self.name).eval().requires_grad_(False)

    def text_encoder(self) -> Any:
        """``CLIPTextModel`` in float32, frozen."""
        from transformers import CLIPTextModel

        return check_finite(_load(CLIPTextModel, self.folder / "text_encoder"), self.name).eval().requires_grad_(False)

    def text_encoders(self) -> list[tuple[Any, Any]]:
        """``(tokenizer, text encoder)`` once for Stable Diffusion 1 and 2, twice for SDXL; float32, frozen."""
        out = [(self.tokenizer(), self.text_encoder())]
        if (self.folder / "text_encoder_2").is_dir():
            from transformers import CLIPTextModelWithProjection, CLIPTokenizer

            second = check_finite(_load(CLIPTextModelWithProjection, self.folder / "text_encoder_2"), self.name)
            tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer_2")
            out.append((tokenizer, second.eval().requires_grad_(False)))
        return out

    def zero_empty_prompt(self) -> bool:
        """Whether the pipeline replaces the empty prompt's states by zeros, as SDXL's does."""
        index = self.folder / "model_index.json"
        return index.is_file() and bool(json.loads(index.read_text()).get("force_zeros_for_empty_prompt", False))

    def tokenizer(self) -> Any:
        """``CLIPTokenizer``."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer")

    def vae(self) -> Any:
        """``AutoencoderTiny`` or ``AutoencoderKL`` in float32, frozen."""
        import diffusers

        kind = json.loads((self.folder / "vae" / "config.json").read_text()).get("_class_name", "AutoencoderKL")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise InputError(f"{self.folder}: the VAE is a {kind}; known: AutoencoderKL, AutoencoderTiny")
        return (
            check_finite(_load(getattr(diffusers, kind), self.folder / "vae"), self.name).eval().requires_grad_(False)
        )

    def config(self, network: str) -> dict[str, Any]:
        """A network's config as it is on disk: ``unet``, ``text_encoder`` or ``vae``."""
        path = self.folder / network / "config.json"
        try:
            held: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise InputError(f"{path} is not readable as JSON ({e}); fetch it again") from None
        return held

    def sizes(self) -> Sizes:
        """What the networks' tensors measure, from the configs alone."""
        unet, text, vae = (self.config(n) for n in ("unet", "text_encoder", "vae"))
        size = unet["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        blocks = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
        latent = (unet["in_channels"], height, width)
        factor = 2 ** (len(blocks) - 1)
        multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        return Sizes(latent, unet["cross_attention_dim"], text["vocab_size"], factor, multiple)

    def random_guide(self, name: str) -> dict[str, str] | None:
        """Name and hash of the guide that ``make_guide`` makes; None where guides are read from files."""
        return None

    def guide_class(self, name: str) -> Any:
        """The class of the guide that ``make_guide`` makes; None where guides are read from files."""
        return None

    def make_guide(self, name: str, unet: Any) -> Any:
        """A guide that comes with the base itself; None where guides are read from files."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every weight file, and of the whole; what a manifest records."""
        if not self._hashes:
            parts = ["unet", "text_encoder", "vae"]
            parts += ["text_encoder_2"] if (self.folder / "text_encoder_2").is_dir() else []
            files = {p: weight_files(self.folder / p) for p in parts}
            if self.unet_file is not None:
                files["unet"] = [self.unet_file]
            self._hashes = {p: files_sha256(f) for p, f in files.items()}
            self._hashes["all"] = digest(self._hashes)
        return self._hashes


def is_hub_id(name: str) -> bool:
    """Whether ``resolve`` would fetch this name from the hub: it is no folder or file here."""
    path = Path(name)
    return name.count("/") == 1 and not path.suffix and not name.startswith((".", "/")) and not path.exists()


def resolve(name: str) -> BaseModel:
    """The base model for a name.

    Args:
        name: ``emoji``, a bundled fine-tune, a diffusers folder, a ``.safetensors`` file that holds a U-Net of the
            bundled model's shape, a hub id, or ``random:sd15`` and its like (``random:sd15#2`` is a fine-tune of it:
            another seed's U-Net, the rest the same).

    Raises:
        InputError: with the names that are known, if this is none of them.
    """
    if name == "emoji":
        return BaseModel(name, ASSETS / "emoji")
    path = Path(name)
    bundled = ASSETS / "fine-tunes" / f"{name}.safetensors"
    if bundled.is_file():
        return BaseModel(name, ASSETS / "emoji", bundled)
    if path.is_dir():
        missing = [p for p in ("unet", "text_encoder", "vae", "tokenizer", "scheduler") if not (path / p).is_dir()]
        if missing:
            raise InputError(
                f"{path} is not a diffusers folder: it has no {', '.join(missing)}; "
                "save one with pipeline.save_pretrained"
            )
        for part in ("unet", "text_encoder", "vae"):
            if not list((path / part).glob("*.safetensors")):
                raise InputError(
                    f"{path / part} holds no .safetensors; pickled weights are not read; "
                    "save again with safe_serialization=True"
                )
        return BaseModel(name, path)
    if path.suffix == ".safetensors" and path.is_file():
        from .single_base import SingleFileBase

        return SingleFileBase.of(path, name)
    if name.startswith("random:"):
        from .random import random_base

        return random_base(name)
    if is_hub_id(name):
        return BaseModel(name, _from_hub(name))
    known = ", ".join([*bundled_bases(), *random_bases()])
    raise InputError(f"no base model '{name}'; known: {known}, a diffusers folder, a U-Net .safetensors, or a hub id")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a network's weights: the shards of its index, the plain file, or the only one.

    Raises:
        InputError: if there is none, or one cannot tell which of several is meant.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError) as e:
            raise InputError(f"{index} is not readable as an index of weights ({e}); fetch it again") from None
    found = sorted(folder.glob("*.safetensors"))
    plain = [p for p in found if p.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if plain or len(found) == 1:
        return plain or found
    if not found:
        raise InputError(f"{folder} holds no .safetensors; save again with safe_serialization=True")
    raise InputError(f"{folder} holds {len(found)} sets of weights ({found[0].name} …); keep the one that is meant")


def files_sha256(files: list[Path]) -> str:
    """Hash of a network's weights: of its only file, or of all shards' hashes."""
    found = [cached_sha256(f) for f in files]
    return found[0] if len(found) == 1 else digest(found)


def random_unet_config(name: str) -> dict[str, Any]:
    """The U-Net config of ``random:sd15`` and its like.

    Raises:
        InputError: listing the known ones.
    """
    path = PRESETS / f"{name.removeprefix('random:').partition('#')[0]}.json"
    if not path.is_file():
        raise InputError(f"no base model '{name}'; known: {', '.join([*bundled_bases(), *random_bases()])}")
    return json.loads(path.read_text())


def load_unet_weights(unet: Any, file: Path) -> None:
    """Replace a U-Net's weights by those of a safetensors file of the same shape.

    Raises:
        InputError: if the file is damaged, lacks a weight, has one too many, or one of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file} is not a readable safetensors file ({e}); fetch it again") from e
    own = unet.state_dict()
    check_same_weights(own, weights, str(file), "this U-Net")
    unet.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})


def check_same_weights(own: Mapping[str, Any], given: Mapping[str, Any], name: str, what: str) -> None:
    """Hold the weights of a checkpoint against those of a network.

    Args:
        own: the network's, by key.
        given: the checkpoint's.
        name: of the checkpoint, for the message.
        what: the network, for the message.

    Raises:
        InputError: listing what is missing and what is left over, or the first weight of another shape.
    """
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise InputError(
            f"{name} is no fine-tune of {what}: {_count(missing)} missing and {_count(extra)} left over; "
            "use a checkpoint of the same architecture"
        )
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise InputError(f"{name}: {key} has shape {list(value.shape)}, {what} has {list(own[key].shape)}")


def _count(keys: list[str]) -> str:
    """``2 weights (conv_in.bias, conv_in.weight)``; at most four are named."""
    named = f" ({', '.join(keys[:4])}{' …' if len(keys) > 4 else ''})" if keys else ""
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'}{named}"


def check_finite(module: Any, name: str) -> Any:
    """Raise ``InputError`` that names the first weight that is not finite; returns the module."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(
                f"base model '{name}': the weight {key} holds values that are not finite; fetch or train it again"
            )
    return module


def copy_tokenizer(base: BaseModel, target: Path) -> dict[str, int]:
    """Write the base's tokenizer as one ``tokenizer.json``; returns ``{"length", "pad"}``."""
    tokenizer = base.tokenizer()
    source = base.folder / "tokenizer" / "tokenizer.json"
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        tokenizer.backend_tokenizer.save(str(target))
    return {"length": int(tokenizer.model_max_length), "pad": int(tokenizer.pad_token_id)}


def quiet_libraries() -> None:
    """No remarks (such as on AutoencoderTiny's own ``block_out_channels``) and no bars; errors are still raised."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _load(kind: Any, folder: Path) -> Any:
    import torch

    quiet_libraries()

    options = {"torch_dtype": torch.float32} if kind.__module__.startswith("diffusers") else {"dtype": torch.float32}
    try:
        module, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as e:  # OSError, SafetensorError, ValueError, KeyError … by what is wrong with the files
        raise InputError(f"{folder} does not load as {kind.__name__}: {str(e).splitlines()[0]}") from e
    if missing := sorted(found["missing_keys"]):  # the libraries would fill them with random numbers
        raise InputError(f"{folder} lacks {_count(missing)} of a {kind.__name__}; fetch it again")
    return module


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        allow = ["*.json", "*.txt", "unet/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=allow))
    except Exception as e:
        raise InputError(
            f"the hub model '{name}' cannot be had: {type(e).__name__}; check the name and the network, or download it "
            f"and pass its folder (bundled models: {', '.join(bundled_bases())})"
        ) from e

"""Base models by name: the bundled one, its fine-tunes, diffusers folders, single U-Net files, random weights."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..assets import ROOT as ASSETS
from ..bundle.store import cached_sha256, digest
from ..errors import InputError
from .configs import identity
from .files import PICKLES, choose, files_sha256, read_json, stem_of, weight_files
from .folders import check_folder, check_unet, left_out
from .networks import check_finite, load_network, load_unet_weights, network_config
from .tokenizer import load_tokenizer

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
        return {k: v for k, v in self._scheduler().items() if not k.startswith("_")}

    def scheduler_class(self) -> str | None:
        """The class of diffusers that the scheduler's config names, None where it names none."""
        name = self._scheduler().get("_class_name")
        return None if name is None else str(name)

    def _scheduler(self) -> dict[str, Any]:
        return read_json(self.folder / "scheduler" / "scheduler_config.json")

    def unet(self) -> Any:
        """``UNet2DConditionModel`` in float32, frozen.

        Raises:
            InputError: if its files are damaged, or it takes other inputs than latents, timestep and text.
        """
        from diffusers import UNet2DConditionModel

        check_unet(self.config("unet"), self.config("vae"), self.name)
        unet = load_network(UNet2DConditionModel, self.folder / "unet")
        if self.unet_file is not None:
            load_unet_weights(unet, self.unet_file)
        return self._frozen(unet)

    def text_encoder(self) -> Any:
        """``CLIPTextModel`` in float32, frozen."""
        from transformers import CLIPTextModel

        return self._frozen(load_network(CLIPTextModel, self.folder / "text_encoder"))

    def text_encoders(self) -> list[tuple[Any, Any]]:
        """``(tokenizer, text encoder)`` once for Stable Diffusion 1 and 2, twice for SDXL; float32, frozen."""
        out = [(self.tokenizer(), self.text_encoder())]
        if self.two_text_encoders:
            from transformers import CLIPTextModelWithProjection

            second = self._frozen(load_network(CLIPTextModelWithProjection, self.folder / "text_encoder_2"))
            out.append((load_tokenizer(self.folder / "tokenizer_2", self.config("text_encoder_2")), second))
        return out

    @property
    def two_text_encoders(self) -> bool:
        """Whether text goes through two encoders, as in SDXL."""
        return (self.folder / "text_encoder_2").is_dir()

    def zero_empty_prompt(self) -> bool:
        """Whether the pipeline replaces the empty prompt's states by zeros, as SDXL's does."""
        index = self.folder / "model_index.json"
        return index.is_file() and bool(read_json(index).get("force_zeros_for_empty_prompt", False))

    def tokenizer(self) -> Any:
        """``CLIPTokenizer`` whose ``model_max_length`` fits the text encoder."""
        return load_tokenizer(self.folder / "tokenizer", self.config("text_encoder"))

    def vae(self) -> Any:
        """``AutoencoderTiny`` or ``AutoencoderKL`` in float32, frozen."""
        import diffusers

        kind = self.config("vae").get("_class_name", "AutoencoderKL")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise InputError(f"{self.folder}: the VAE is a {kind}; known: AutoencoderKL, AutoencoderTiny")
        return self._frozen(load_network(getattr(diffusers, kind), self.folder / "vae"))

    def _frozen(self, network: Any) -> Any:
        return check_finite(network, self.name).eval().requires_grad_(False)

    def config(self, network: str) -> dict[str, Any]:
        """A network's config as it is on disk: ``unet``, ``text_encoder`` or ``vae``."""
        return network_config(self.folder / network)

    def check(self) -> None:
        """Load every network once and let it go, so that a fault of any is reported before one is exported.

        Raises:
            InputError: for files that are damaged, and for models that cannot be built.
        """
        if self.two_text_encoders:
            raise InputError(
                f"{self.name} has two text encoders (Stable Diffusion XL), which bundles do not hold yet; "
                "pnp-trt distill and pnp-trt visualize take it"
            )
        self.tokenizer()
        for load in (self.text_encoder, self.vae, self.unet):
            load()

    def configs_sha256(self) -> str:
        """Hash of what is not a weight and changes images: configs, tokenizer and noise schedule."""
        names = ["unet", "text_encoder", "vae", *(["text_encoder_2"] if self.two_text_encoders else [])]
        tokenizers = sorted(p for p in self.folder.glob("tokenizer*/*") if p.suffix in (".json", ".txt"))
        return digest(
            [
                {n: identity(self.config(n)) for n in names},
                {"class": self.scheduler_class(), **self.scheduler_config()},
                {p.relative_to(self.folder).as_posix(): cached_sha256(p) for p in tokenizers},
                self.zero_empty_prompt(),
            ]
        )

    def left_out(self) -> list[str]:
        """Parts of the model's pipeline that a bundle does not hold, such as a safety checker."""
        return left_out(self.folder)

    def sizes(self) -> Sizes:
        """What the networks' tensors measure, from the configs alone.

        Raises:
            InputError: if a config lacks an entry that this takes.
        """
        unet, text, vae = (self.config(n) for n in ("unet", "text_encoder", "vae"))
        try:
            size = unet["sample_size"]
            height, width = size if isinstance(size, list) else (size, size)
            blocks = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
            factor = 2 ** (len(blocks) - 1)
            multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
            latent = (int(unet["in_channels"]), int(height), int(width))
            return Sizes(latent, int(unet["cross_attention_dim"]), int(text["vocab_size"]), factor, multiple)
        except KeyError as e:
            raise InputError(f"{self.name}: a config.json lacks {e}; download the model again") from None
        except (TypeError, ValueError) as e:
            raise InputError(f"{self.name}: a config.json holds a size that is no number ({e})") from None

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
            parts += ["text_encoder_2"] if self.two_text_encoders else []
            files = {p: weight_files(self.folder / p) for p in parts}
            if self.unet_file is not None:
                files["unet"] = [self.unet_file]
            self._hashes = {p: files_sha256(f) for p, f in files.items()}
            self._hashes["all"] = digest(self._hashes)
        return self._hashes


def is_hub_id(name: str) -> bool:
    """Whether ``resolve`` would fetch this name from the hub: ``owner/model``, dots allowed, and nothing here."""
    suffixes = (".safetensors", ".json", *PICKLES)
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not name.endswith(suffixes)
    return bool(known) and not Path(name).exists()


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
        check_folder(path)
        return BaseModel(name, path)
    if path.suffix == ".safetensors" and path.is_file():
        from .single_base import SingleFileBase

        return SingleFileBase.of(path, name)
    if path.suffix in PICKLES and path.is_file():
        raise InputError(f"{path} holds pickled weights, which are not read; save the model as safetensors")
    if name.startswith("random:"):
        from .random import random_base

        return random_base(name)
    if is_hub_id(name):
        return BaseModel(name, _from_hub(name))
    known = ", ".join([*bundled_bases(), *random_bases()])
    raise InputError(f"no base model '{name}'; known: {known}, a diffusers folder, a U-Net .safetensors, or a hub id")


def random_unet_config(name: str) -> dict[str, Any]:
    """The U-Net config of ``random:sd15`` and its like.

    Raises:
        InputError: listing the known ones.
    """
    path = PRESETS / f"{name.removeprefix('random:').partition('#')[0]}.json"
    if not path.is_file():
        raise InputError(f"no base model '{name}'; known: {', '.join([*bundled_bases(), *random_bases()])}")
    return json.loads(path.read_text(encoding="utf-8"))


def _from_hub(name: str) -> Path:
    """The folder of a hub model: its configs, and of each network the weights that would be loaded."""
    try:
        from huggingface_hub import list_repo_files, snapshot_download

        patterns = ["*.json", "*.txt", "*/*.safetensors"]
        with suppress(OSError):  # no network: the cache holds what was chosen when it was fetched
            patterns = hub_patterns(list_repo_files(name), name)
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except InputError:
        raise
    except Exception as e:
        raise InputError(
            f"the hub model '{name}' cannot be had: {type(e).__name__}; check the name and the network, or download it "
            f"and pass its folder (bundled models: {', '.join(bundled_bases())})"
        ) from e
    check_folder(folder)
    return folder


def hub_patterns(names: list[str], model: str) -> list[str]:
    """The files of a hub model that are fetched, as patterns.

    Raises:
        InputError: if a network has no safetensors files.
    """
    patterns = ["*.json", "*.txt"]
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        own = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/") and n.count("/") == 1]
        if own:
            choice = choose(own, stem_of(part), f"{model}/{part}")
            patterns += [f"{part}/{n}" for n in (choice.shards(own) if choice.sharded else [choice.name])]
    return patterns

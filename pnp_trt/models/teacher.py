"""Base models by name: the bundled one, its fine-tunes, diffusers folders, single U-Net files, random weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.document import Value, check_bounds
from ..bundle.scheduler_config import scheduler_entries
from ..bundle.store import cached_sha256, digest
from ..errors import InputError
from .catalog import PRESETS, bundled_bases, random_bases
from .configs import identity
from .files import FETCH, files_sha256, read_json, weight_files
from .folders import check_unet, latent_size, left_out
from .networks import check_finite, load_network, load_unet_weights, network_config
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sizes:
    """What a base model's tensors measure.

    Attributes:
        latent: channels, height and width of a latent.
        text_width: width of a text state.
        vocabulary: number of token ids.
        factor: image pixels to a latent's.
        multiple: what an image's height and width are multiples of, so that the U-Net halves them without rest.
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
        """The scheduler's config without diffusers' private keys, and without nulls, which stand for defaults.

        Raises:
            InputError: if an entry is of another type or out of bounds.
        """
        return {k: v for k, v in self._scheduler().items() if not k.startswith("_")}

    def scheduler_class(self) -> str | None:
        """The class of diffusers that the scheduler's config names, None where it names none."""
        name = self._scheduler().get("_class_name")
        return None if name is None else str(name)

    def _scheduler(self) -> dict[str, Any]:
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = read_json(path, constants=True)
        # diffusers writes the default of DPM-Solver++, which clips nothing, as -Infinity
        if config.get("lambda_min_clipped") == -math.inf:
            del config["lambda_min_clipped"]
        try:
            check_bounds(config)
        except ValueError as e:
            raise InputError(f"{path} is not usable JSON ({e}); {FETCH}") from None
        entries = scheduler_entries(Value(config, "", str(path), FETCH))
        return {k: v for k, v in entries.items() if v is not None}

    def side(self) -> int:
        """Side of a square latent, ``sample_size`` of the U-Net.

        Raises:
            InputError: if it is not one number.
        """
        size = self.config("unet").get("sample_size")
        if isinstance(size, list):
            raise InputError(f"{self.name}: the U-Net's sample_size is {size}; this command takes square images alone")
        return latent_size(self.config("unet"), self.name)[0]

    def unet(self) -> Any:
        """``UNet2DConditionModel`` in float32, frozen.

        Raises:
            InputError: if its files are damaged, or it takes other inputs than latents, timestep and text.
        """
        from diffusers import UNet2DConditionModel

        check_unet(self.config("unet"), self.config("vae"), self.name)
        latent_size(self.config("unet"), self.name)
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
        """``AutoencoderTiny`` or ``AutoencoderKL`` in float32, frozen.

        Raises:
            InputError: if its files are damaged, it is of another class, or latents cannot be divided by its factor.
        """
        import diffusers

        config = self.config("vae")
        kind = config.get("_class_name", "AutoencoderKL")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise InputError(f"{self.folder}: the VAE is of class {kind}; known: AutoencoderKL, AutoencoderTiny")
        entries = Value(config, "", str(self.folder / "vae" / "config.json"), FETCH)
        for key, low in (("scaling_factor", 1e-6), ("shift_factor", -1e6)):
            if config.get(key) is not None:
                entries.member(key).number(low, 1e6)
        return self._frozen(load_network(getattr(diffusers, kind), self.folder / "vae"))

    def denoiser(self) -> Any:
        """The plain denoiser as it is exported.

        A module of ``sample [B, C, H, W]``, ``timestep [B]`` and ``encoder_hidden_states [B, tokens, D]`` that returns
        the prediction ``[B, C, H, W]``.
        """
        from .student import Teacher

        return Teacher(self.unet())

    def text_module(self) -> Any:
        """The text encoder as it is exported: ``input_ids [B, tokens]`` → states ``[B, tokens, D]``."""
        from .wrappers import TextEncoder

        return TextEncoder(self.text_encoder())

    def decoder_module(self) -> Any:
        """The decoder as it is exported: ``latents [B, C, H, W]`` → pixels ``[B, 3, H·f, W·f]`` in [-1, 1]."""
        from .wrappers import VaeDecoder

        return VaeDecoder(self.vae())

    def encoder_module(self) -> Any:
        """The encoder as it is exported: pixels ``[B, 3, H·f, W·f]`` in [-1, 1] → latents ``[B, C, H, W]``."""
        from .wrappers import VaeEncoder

        return VaeEncoder(self.vae())

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
            height, width = latent_size(unet, self.name)
            blocks = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
            factor = 2 ** (len(blocks) - 1)
            multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
            latent = (int(unet["in_channels"]), height, width)
            return Sizes(latent, int(unet["cross_attention_dim"]), int(text["vocab_size"]), factor, multiple)
        except KeyError as e:
            raise InputError(f"{self.name}: a config.json lacks {e}; download the model again") from None
        except (TypeError, ValueError) as e:
            raise InputError(f"{self.name}: a config.json holds a size that is not a number ({e})") from None

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


def random_unet_config(name: str) -> dict[str, Any]:
    """The U-Net config of ``random:sd15`` and its like.

    Raises:
        InputError: listing the known ones.
    """
    path = PRESETS / f"{name.removeprefix('random:').partition('#')[0]}.json"
    if not path.is_file():
        raise InputError(f"no base model '{name}'; known: {', '.join([*bundled_bases(), *random_bases()])}")
    return json.loads(path.read_text(encoding="utf-8"))

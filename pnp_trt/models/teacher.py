"""Base models: the teacher's networks, loaded from a diffusers folder, with or without another U-Net or VAE."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..bundle.document import Value, check_bounds
from ..bundle.scheduler_config import scheduler_entries
from ..bundle.store import cached_sha256, digest
from ..errors import InputError
from .catalog import PRESETS, bundled_bases, random_bases
from .configs import identity
from .files import FETCH, files_sha256, read_json, weight_files
from .folders import check_unet, latent_size, left_out
from .networks import check_finite, load_network, load_unet_weights, network_config
from .other_vae import OtherVae
from .specs import TITLES, NetworkSpec, TextEncoderSpec
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Sizes of a base model's tensors.

    Attributes:
        latent: channels, height and width of a latent.
        text_width: width of a text state.
        vocabulary: number of token ids.
        factor: image pixels per latent pixel, along each side.
        multiple: number that divides an image's height and width, so that the U-Net can halve them exactly.
    """

    latent: tuple[int, int, int]
    text_width: int
    vocabulary: int
    factor: int
    multiple: int


@dataclass
class BaseModel:
    """A teacher: its networks (loaded on demand) and the location of its files.

    Attributes:
        name: name as entered by the user.
        folder: a diffusers folder.
        unet_file: weights that replace the folder's own U-Net (a fine-tune), or None.
        other_vae: autoencoder that replaces the model's own, or None.
        family: name of the family.
        text_specs: the text encoders, in the order in which their states are concatenated.
        unet_additions: values of the U-Net's ``addition_embed_type`` that the family supports.
        pipeline: class of diffusers' pipeline.
    """

    family: ClassVar[str] = "sd"
    text_specs: ClassVar[tuple[TextEncoderSpec, ...]] = (TextEncoderSpec(),)
    unet_additions: ClassVar[tuple[str | None, ...]] = (None,)
    pipeline: ClassVar[str] = "StableDiffusionPipeline"

    name: str
    folder: Path
    unet_file: Path | None = None
    _hashes: dict[str, str] = field(default_factory=dict)
    other_vae: OtherVae | None = field(default=None, kw_only=True)

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's config without diffusers' private keys, and without nulls, which mean defaults.

        Raises:
            InputError: if an entry is of the wrong type or out of bounds.
        """
        return {k: v for k, v in self._scheduler().items() if not k.startswith("_")}

    def scheduler_class(self) -> str | None:
        """The class in diffusers that the scheduler's config names; None if it names none."""
        name = self._scheduler().get("_class_name")
        return None if name is None else str(name)

    def scheduler_file(self) -> Path:
        """Path of the noise schedule's config."""
        return self.folder / "scheduler" / "scheduler_config.json"

    def _scheduler(self) -> dict[str, Any]:
        path = self.scheduler_file()
        config = read_json(path, constants=True)
        # diffusers writes the default of DPM-Solver++ (no clipping) as -Infinity
        if config.get("lambda_min_clipped") == -math.inf:
            del config["lambda_min_clipped"]
        try:
            check_bounds(config)
        except ValueError as e:
            raise InputError(f"{path} is not usable JSON ({e}); {FETCH}") from None
        entries = scheduler_entries(Value(config, "", str(path), FETCH))
        return {k: v for k, v in entries.items() if v is not None}

    def side(self) -> int:
        """Side of a square latent: the U-Net's ``sample_size``.

        Raises:
            InputError: if it is not a single number.
        """
        size = self.config("unet").get("sample_size")
        if isinstance(size, list):
            raise InputError(f"{self.name}: the U-Net's sample_size is {size}; this command needs a square image")
        return latent_size(self.config("unet"), self.name)[0]

    def unet(self) -> Any:
        """``UNet2DConditionModel`` in float32, frozen.

        Raises:
            InputError: if its files are damaged, or it takes inputs other than latents, timestep and text.
        """
        from diffusers import UNet2DConditionModel

        self.check_configs()
        unet = load_network(UNet2DConditionModel, self.folder / "unet")
        if self.unet_file is not None:
            load_unet_weights(unet, self.unet_file)
        return self.frozen(unet)

    def check_configs(self) -> None:
        """Refuse models that cannot be built, reading only their configs.

        Raises:
            InputError: if the kind of model is not supported, or an entry is out of bounds.
        """
        check_unet(self.config("unet"), self.config("vae"), self.name, self.unet_additions)
        latent_size(self.config("unet"), self.name)

    def text_encoder(self, spec: TextEncoderSpec | None = None) -> Any:
        """A text encoder in float32, frozen; the first one if ``spec`` is None."""
        import transformers

        spec = spec or self.text_specs[0]
        return self.frozen(load_network(getattr(transformers, spec.kind), self.folder / spec.name))

    def text_encoders(self) -> list[tuple[Any, Any]]:
        """Pairs of tokenizer and text encoder (float32, frozen): one for Stable Diffusion 1 and 2, two for SDXL."""
        return [(self.tokenizer(spec), self.text_encoder(spec)) for spec in self.text_specs]

    def zero_empty_prompt(self) -> bool:
        """Whether CFG without a negative prompt uses zeros instead of the empty prompt's text states, as in SDXL."""
        return False

    def tokenizer(self, spec: TextEncoderSpec | None = None) -> Any:
        """``CLIPTokenizer`` whose ``model_max_length`` fits its text encoder; the first one if ``spec`` is None."""
        spec = spec or self.text_specs[0]
        return load_tokenizer(self.tokenizer_folder(spec), self.config(spec.name))

    def tokenizer_folder(self, spec: TextEncoderSpec) -> Path:
        """Folder of a text encoder's tokenizer."""
        return self.folder / spec.tokenizer

    def networks(self, image_to_image: bool = False) -> dict[str, NetworkSpec]:
        """The networks of a bundle by name, without those of a guide.

        Args:
            image_to_image: whether to include the VAE's encoder.
        """
        specs = {"unet": NetworkSpec(TITLES["unet"], self.denoiser, ("prediction",))}
        for spec in self.text_specs:
            specs[spec.name] = NetworkSpec(
                spec.title, partial(self.text_module, spec), spec.outputs, sized=False, one_by_one=True
            )
        specs["vae_decoder"] = NetworkSpec(TITLES["vae_decoder"], self.decoder_module, ("sample",), decodes=True)
        if image_to_image:
            specs["vae_encoder"] = NetworkSpec(
                TITLES["vae_encoder"], self.encoder_module, ("latents",), one_by_one=True
            )
        return specs

    def golden_inputs(
        self, sample: tuple[int, int, int], size: tuple[int, int], tokens: int, *, guided: bool,
        negative: bool = False, image_to_image: bool = False,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        """Seeded torch inputs of each network at batch size 2, with different timesteps and scales in the batch.

        Args:
            sample: shape of a latent, ``(C, H, W)``.
            size: height and width of the image in pixels.
            tokens: number of tokens of a prompt.
            guided: whether a guide is fused, which needs w.
            negative: whether the guide needs negative prompts.
            image_to_image: whether there is a VAE encoder.
        """
        import torch

        g = torch.Generator().manual_seed(20240)
        sizes = self.sizes()
        first, *others = self.text_specs
        unet = {
            "sample": torch.randn(2, *sample, generator=g),
            "timestep": torch.tensor([801, 41]),
            "encoder_hidden_states": torch.randn(2, tokens, sizes.text_width, generator=g),
        }
        if guided:
            unet["guidance"] = torch.tensor([2.0, 7.5])
        inputs = {
            "unet": unet,
            first.name: {"input_ids": torch.randint(0, sizes.vocabulary, (2, tokens), generator=g)},
            "vae_decoder": {"latents": torch.randn(2, *sample, generator=g)},
        }
        if guided:
            inputs["condition"] = {"guidance": unet["guidance"]}
        if negative:
            unet["negative"] = torch.randn(2, tokens, sizes.text_width, generator=g)
        if image_to_image:
            inputs["vae_encoder"] = {"pixels": torch.rand(2, 3, *size, generator=g) * 2 - 1}
        for spec in others:
            config = self.config(spec.name)
            ids = torch.randint(0, int(config["vocab_size"]), (2, tokens), generator=g)
            ids[:, tokens // 2] = _end_of_text(config)  # the position of the projected text
            inputs[spec.name] = {"input_ids": ids}
        unet |= self.golden_added(g, 2, size)
        return inputs

    def golden_added(self, generator: Any, rows: int, size: tuple[int, int]) -> dict[str, Any]:
        """Seeded values of the U-Net's inputs besides latents, timestep and text states, ``[rows, …]`` each, by name.

        Args:
            generator: a ``torch.Generator``.
            size: height and width of the image in pixels.
        """
        return {}

    def vae(self) -> Any:
        """The autoencoder in float32 (float16 for random bases), frozen: ``other_vae`` if it is set.

        Raises:
            InputError: as in :meth:`own_vae`.
        """
        if self.other_vae is None:
            return self.own_vae()
        return self.frozen(self.other_vae.load(self.own_config("vae")))

    def own_vae(self) -> Any:
        """``AutoencoderTiny`` or ``AutoencoderKL`` in float32, frozen.

        Raises:
            InputError: if its files are damaged, it is of another class, or its scaling of latents is out of bounds.
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
        for key, low in (("latents_mean", -1e6), ("latents_std", 1e-6)):
            if config.get(key) is not None:
                count = int(entries.member("latent_channels").integer(1, 1024))
                for number in entries.member(key).items(count, count):
                    number.number(low, 1e6)
        return self.frozen(load_network(getattr(diffusers, kind), self.folder / "vae"))

    def denoiser(self) -> Any:
        """The denoiser without a guide, in the form that is exported.

        A module that takes ``sample [B, C, H, W]``, ``timestep [B]`` and ``encoder_hidden_states [B, tokens, D]`` and
        returns the prediction ``[B, C, H, W]``.
        """
        from .student import Teacher

        return Teacher(self.unet())

    def text_module(self, spec: TextEncoderSpec) -> Any:
        """A text encoder in the form that is exported: ``input_ids [B, tokens]`` → states ``[B, tokens, D]`` and the
        spec's other outputs.
        """
        from . import wrappers

        return getattr(wrappers, spec.wrapper)(self.text_encoder(spec))

    def decoder_module(self) -> Any:
        """The exported form of the decoder: ``latents [B, C, H, W]`` → pixels ``[B, 3, H·f, W·f]`` in [-1, 1]."""
        from .wrappers import VaeDecoder

        return VaeDecoder(self.vae())

    def encoder_module(self) -> Any:
        """The exported form of the encoder: pixels ``[B, 3, H·f, W·f]`` in [-1, 1] → latents ``[B, C, H, W]``."""
        from .wrappers import VaeEncoder

        return VaeEncoder(self.vae())

    def frozen(self, network: Any) -> Any:
        """Prepare a network for inference, after checking that its weights are finite."""
        return check_finite(network, self.name).eval().requires_grad_(False)

    def config(self, network: str) -> dict[str, Any]:
        """A network's config (``unet``, ``text_encoder``, ``vae`` …); for ``vae``, ``other_vae``'s if it is set."""
        own = self.own_config(network)
        return own if network != "vae" or self.other_vae is None else self.other_vae.config(own)

    def own_config(self, network: str) -> dict[str, Any]:
        """The model's own config of a network."""
        return network_config(self.folder / network)

    def check(self) -> None:
        """Load and discard every network, so that faults are reported before the first export.

        Raises:
            InputError: if files are damaged, or the model cannot be built.
        """
        for spec in self.text_specs:
            self.tokenizer(spec)
            self.text_encoder(spec)
        self.vae()
        self.unet()

    def configs_sha256(self) -> str:
        """Hash of everything besides weights that affects images: configs, tokenizers and noise schedule."""
        first, *others = (spec.name for spec in self.text_specs)
        names = ["unet", first, "vae", *others]
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
        """Parts of the model's pipeline that a bundle does not contain, such as a safety checker."""
        return left_out(self.folder)

    def sizes(self) -> Sizes:
        """Sizes of the networks' tensors, from the configs.

        Raises:
            InputError: if a config lacks a size, or it is not a number.
        """
        unet, text, vae = (self.config(n) for n in ("unet", self.text_specs[0].name, "vae"))
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
        """Name and hash of the guide that ``make_guide`` creates; None if guides are read from files."""
        return None

    def guide_class(self, name: str) -> Any:
        """Class of the guide that ``make_guide`` creates; None if guides are read from files."""
        return None

    def make_guide(self, name: str, unet: Any) -> Any:
        """Create the base's own guide; None if guides are read from files."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every network's weights and of all together, as recorded in manifests."""
        own = self.own_fingerprint()
        if self.other_vae is None:
            return own
        parts = {k: v for k, v in own.items() if k != "all"} | {"vae": self.other_vae.sha256()}
        return {**parts, "all": digest(parts)}

    def own_fingerprint(self) -> dict[str, str]:
        """As :meth:`fingerprint`, but of the model's own weights, without ``other_vae``."""
        if not self._hashes:
            first, *others = (spec.name for spec in self.text_specs)
            parts = ["unet", first, "vae", *others]
            files = {p: weight_files(self.folder / p) for p in parts}
            if self.unet_file is not None:
                files["unet"] = [self.unet_file]
            self._hashes = {p: files_sha256(f) for p, f in files.items()}
            self._hashes["all"] = digest(self._hashes)
        return self._hashes


def _end_of_text(config: Mapping[str, Any]) -> int:
    """The token at whose position a text encoder projects the prompt: the last id if the config states 2."""
    end = int(config.get("eos_token_id", 2))
    return int(config["vocab_size"]) - 1 if end == 2 else end  # transformers interprets 2 as the largest token id


def random_unet_config(name: str) -> dict[str, Any]:
    """The U-Net config of a random base, such as ``random:sd15``.

    Raises:
        InputError: if the name is unknown; the message lists the known ones.
    """
    path = PRESETS / f"{name.removeprefix('random:').partition('#')[0]}.json"
    if not path.is_file():
        raise InputError(f"no base model '{name}'; known: {', '.join([*bundled_bases(), *random_bases()])}")
    return json.loads(path.read_text(encoding="utf-8"))

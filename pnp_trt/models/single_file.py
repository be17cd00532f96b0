"""Single-file checkpoints: the networks in the file, their naming, and the noise schedule that the file states.

Each key is assigned to the U-Net, a text encoder, the VAE, or to a group of unused weights.  No weights are silently
dropped: a file with unused weights is refused with a message that names them, except for an explicit list of training
leftovers.  Only the header is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .convert import Part, text_weights, unet_weights, vae_weights
from .families import FAMILIES
from .noise import Noise
from .safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

#: prefixes that training code and exporters add to a network's own keys; they may be nested
_WRAPPERS = r"(?:(?:module|state_dict|model_state_dict|model|_orig_mod|unet|diffusion_model)\.)*"
_ORIGINAL = re.compile(rf"({_WRAPPERS})(?:input_blocks\.\d|middle_block\.\d|output_blocks\.\d|time_embed\.\d)")
_DIFFUSERS = re.compile(rf"({_WRAPPERS})(?:down_blocks\.\d|mid_block\.|up_blocks\.\d|time_embedding\.|conv_in\.)")
#: a U-Net's keys with an unknown prefix, for the message
_ANY_UNET = re.compile(r"(.{1,80}?\.)(?:input_blocks|output_blocks|time_embed|down_blocks|up_blocks|time_embedding)\.")
#: top-level modules of a U-Net, by layout
_MODULES = {
    "original": re.compile(r"(?:time_embed|label_emb|input_blocks|middle_block|output_blocks|out|id_predictor)\."),
    "diffusers": re.compile(
        r"(?:conv_in|conv_out|conv_norm_out|time_proj|time_embedding|class_embedding|add_embedding|add_time_proj|"
        r"encoder_hid_proj|down_blocks|mid_block|up_blocks)\."
    ),
}
_OUTER = r"(?:(?:module|state_dict|model_state_dict|_orig_mod)\.)*"
#: prefixes of an autoencoder stored with a U-Net; those of text encoders are in the families' layouts
_VAE = (r"first_stage_model\.", r"vae\.")
#: weights left by training that inference does not use: (pattern, kind)
LEFTOVERS = (
    (r"model_ema\.|ema_model\.|unet_ema\.|(?:\w+\.)*model_ema\.", "EMA copy"),
    (r"optimizer(?:_states?)?\.|lr_schedulers?\.|callbacks\.|loops\.|global_step$|epoch$", "trainer state"),
    (r"(?:betas|logvar|lvlb_weights|alphas_cumprod(?:_prev)?|sqrt_(?:one_minus_|recip_|recipm1_)?alphas_cumprod)$",
     "schedule buffer"),
    (r"(?:log_one_minus_alphas_cumprod|posterior_\w+|(?:model\.)?denoiser\.sigmas|model\.sigmas)$", "schedule buffer"),
    (r"(?:\w+\.)*embeddings\.position_ids$", "position ids"),
    (r"(?:\w+\.)*first_stage_model\.loss\.", "VAE's training loss"),
    (r"(?:\w+\.)*(?:cond_stage_model\.(?:model|transformer)|text_encoder)\.(?:logit_scale|text_projection(?:\.weight)?|"
     r"attn_mask|model\.attn_mask)$", "CLIP's projection for training"),
)  # fmt: skip
#: networks that no engine takes from a single file: (pattern, kind)
_UNUSED = (
    (r"(?:\w+\.)*conditioner\.embedders\.", "text encoders of SDXL"),
    (r"(?:\w+\.)*text_encoders?_?[23]\.|text_encoders\.", "further text encoders"),
    (r"(?:\w+\.)*cond_stage_model\.", "a text encoder of another kind"),
    (r"(?:\w+\.)*control_model\.|controlnet\w*\.|input_hint_block\.", "a ControlNet"),
    (r"lora_\w+|.*\.lora_(?:A|B|down|up)\.", "a LoRA"),
    (r"safety_checker\.", "a safety checker"),
    (r"(?:model\.|diffusion_model\.|transformer\.)*(?:double_blocks|single_blocks|joint_blocks|transformer_blocks)\.",
     "a diffusion transformer"),
    (r"(?:transformer\.)?(?:text_model\.)?(?:embeddings\.\w+_embedding|encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm)|"
     r"final_layer_norm|text_projection)|transformer\.resblocks\.|text_model\.", "a text encoder"),
    (r"(?:encoder|decoder|quant_conv|post_quant_conv)\.", "a VAE"),
    (r"image_encoder\.|ip_adapter\.|image_proj\.|embedder\.", "an image encoder"),
)  # fmt: skip
#: empty tensors by which a file states its prediction type
MARKERS = ("v_pred", "ztsnr")


@dataclass(frozen=True)
class SingleFile:
    """A single-file checkpoint, of which only the header was read.

    Attributes:
        parts: networks that an engine may use, by name; always includes ``unet``.
        unused: keys that no engine uses, by kind.
        leftovers: keys left by training, by kind; they are ignored.
        noise: prediction type and terminal SNR stated by the file.
        prefix: prefix of the U-Net's keys.
    """

    path: Path
    parts: dict[str, Part]
    unused: dict[str, list[str]]
    leftovers: dict[str, list[str]]
    shapes: dict[str, tuple[int, ...]]
    noise: Noise
    prefix: str

    def weights(self, network: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Load the weights of one of ``parts`` under diffusers' or transformers' names.

        Args:
            config: config of the network that the weights are for.

        Raises:
            InputError: if the file is damaged, or lacks weights that the converter needs.
        """
        convert = {"unet": unet_weights, "vae": vae_weights}.get(network, text_weights)
        return convert(self.path, self.parts[network], config)

    def misfits(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Reasons why text encoders or VAE of the file cannot replace those of these configs, by network."""
        reasons = {}
        for name, part in self.parts.items():
            if name == "unet":
                continue
            if name not in configs:
                reasons[name] = "it has no such network"
            elif reason := (_vae_misfit if name == "vae" else _text_misfit)(self, part, configs[name]):
                reasons[name] = reason
        return reasons

    def refuse_unused(self, configs: Mapping[str, Mapping[str, Any]], what: str) -> None:
        """Raise ``InputError`` if an engine of these configs does not use every part of the file.

        Args:
            configs: configs of the engine's (or base's) networks.
            what: the engine or base, for the message.
        """
        problems = [f"{_count(keys)} of {kind}" for kind, keys in self.unused.items()]
        problems += [
            f"a {_TITLES[part]} that {what} cannot take ({reason})" for part, reason in self.misfits(configs).items()
        ]
        if problems:
            raise InputError(
                f"{self.path} holds {' and '.join(problems)}, which would not be used; pass --unet-only to use only "
                "its U-Net, or save the model as a diffusers folder"
            )


_TITLES = {"text_encoder": "text encoder", "text_encoder_2": "second text encoder", "vae": "VAE"}


@cache
def _beside() -> tuple[tuple[str, str, str], ...]:
    """(part, layout, prefix) of the networks that a file may contain besides the U-Net."""
    text = [(own.network, own.names, own.prefix) for family in FAMILIES.values() for own in family.layouts]
    vae = [("vae", "original", prefix) for prefix in _VAE]
    return tuple((part, names, _OUTER + prefix) for part, names, prefix in (*text, *vae))


@cache
def _leftovers() -> tuple[tuple[str, str], ...]:
    """``LEFTOVERS`` and the families' leftovers."""
    return (*LEFTOVERS, *(own for family in FAMILIES.values() for own in family.leftovers))


@dataclass
class _Sorter:
    """Assignment of a file's keys to its parts."""

    parts: dict[str, Part] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    leftovers: dict[str, list[str]] = field(default_factory=dict)

    def sort(self, keys: list[str]) -> list[str]:
        """Assign all keys but the U-Net's; return those that remain."""
        rest = []
        for key in keys:
            if (kind := _match(_leftovers(), key)) is not None:
                self.leftovers.setdefault(kind, []).append(key)
            elif key not in MARKERS and not self._beside(key):
                rest.append(key)
        return rest

    def _beside(self, key: str) -> bool:
        for part, layout, prefix in _beside():
            if (match := re.match(prefix, key)) is not None:
                entry = self.parts.setdefault(part, Part(layout, {}))
                if entry.layout != layout:
                    self.unused.setdefault(f"a second {_TITLES[part]}", []).append(key)
                else:
                    entry.keys[key[match.end() :]] = key
                return True
        return False


def read_single_file(path: Path) -> SingleFile:
    """Sort the keys of a checkpoint.

    Raises:
        InputError: if it is not a safetensors file, has no U-Net or several, or contradicts itself about its noise.
    """
    header = read_header(path)
    sorter = _Sorter()
    rest = sorter.sort(list(header.shapes))
    prefix, layout = _unet_prefix(path, rest, sorter.parts)
    owned = prefix.endswith(("unet.", "diffusion_model."))
    unet = {}
    for key in rest:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and (owned or _MODULES[layout].match(name)):
            unet[name] = key
        else:
            sorter.unused.setdefault(_match(_UNUSED, key) or "an unknown kind", []).append(key)
    parts = {"unet": Part(layout, unet), **sorter.parts}
    noise = Noise.stated(header.shapes.keys() & set(MARKERS), header.metadata, str(path))
    return SingleFile(path, parts, sorter.unused, sorter.leftovers, header.shapes, noise, prefix)


def _unet_prefix(path: Path, keys: list[str], parts: Mapping[str, Part]) -> tuple[str, str]:
    """The prefix of the U-Net's keys, and its layout."""
    prefixes = Counter(
        (match[1], layout)
        for key in keys
        for layout, pattern in (("original", _ORIGINAL), ("diffusers", _DIFFUSERS))
        if (match := pattern.match(key)) and not key.startswith("lora_")
    )
    if not prefixes:
        raise InputError(f"{path} holds no U-Net: {_contents(keys, parts)}")
    if len(prefixes) > 1:
        names = " and ".join(f"{n} keys of {layout} names under '{p}'" for (p, layout), n in prefixes.most_common(3))
        raise InputError(f"{path} holds more than one U-Net: {names}; keep only the intended one")
    return next(iter(prefixes))


def _contents(keys: list[str], parts: Mapping[str, Part]) -> str:
    kinds = Counter(_match(_UNUSED, k) for k in keys)
    kinds += Counter({f"a {_TITLES[name]}": len(p.keys) for name, p in parts.items()})
    known = [str(kind) for kind, _ in kinds.most_common() if kind is not None]
    if known == ["a LoRA"]:
        return "it is a LoRA; pass it with --lora"
    if known:
        return f"it is {' and '.join(known)}; pass the complete checkpoint, or a diffusers folder"
    if not keys:
        return "it has no weights"
    if match := next((m for k in keys if (m := _ANY_UNET.match(k))), None):
        return f"its keys begin with '{match[1]}', which is not a known prefix; rename them"
    return f"its keys are {', '.join(keys[:3])} …; rename them as diffusers or the original code does"


def _match(table: tuple[tuple[str, str], ...], key: str) -> str | None:
    return next((kind for pattern, kind in table if re.match(pattern, key)), None)


def _count(keys: list[str]) -> str:
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'} ({keys[0]}{' …' if len(keys) > 1 else ''})"


def _text_misfit(file: SingleFile, part: Part, config: Mapping[str, Any]) -> str | None:
    """Reason why a text encoder does not fit a transformers config; None if it fits."""
    open_clip = part.layout == "open_clip"
    if open_clip and config.get("hidden_act", "quick_gelu") != "gelu":
        return f"it is an OpenCLIP encoder with gelu, but the engine's has {config.get('hidden_act', 'quick_gelu')}"
    name = "token_embedding.weight" if open_clip else "embeddings.token_embedding.weight"
    if name not in part.keys:
        return f"it lacks {name}"
    shape = file.shapes[part.keys[name]]
    own = (config.get("vocab_size", 49408), config.get("hidden_size", 512))
    if shape != own:
        return f"its {name} has shape {list(shape)}, not {list(own)}"
    pattern = r"transformer\.resblocks\.(\d+)\." if open_clip else r"encoder\.layers\.(\d+)\."
    layers = len({m[1] for key in part.keys if (m := re.match(pattern, key))})
    own_layers = config.get("num_hidden_layers", 12)
    if layers != own_layers and not (open_clip and layers == own_layers + 1):  # SD 2 omits the last layer
        return f"it has {layers} layers, not {own_layers}"
    return None


def _vae_misfit(file: SingleFile, part: Part, config: Mapping[str, Any]) -> str | None:
    """Reason why a VAE does not fit a diffusers config; None if it fits."""
    tiny = any(k.startswith(("encoder.layers.", "decoder.layers.")) for k in part.keys)
    own = config.get("_class_name", "AutoencoderKL")
    kind = "AutoencoderTiny" if tiny else "AutoencoderKL"
    return None if kind == own else f"it is an {kind}, but the engine has an {own}"

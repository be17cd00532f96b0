"""Map each key of a LoRA file to a layer and a part of the layer's change."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ....errors import InputError
from .names import LayerNames, LoraTarget

#: prefixes of keys → the network; None if the prefix does not identify it
_PREFIXES: dict[str, str | None] = {
    "base_model.model.": None,  # peft
    "lora_unet_": "unet",  # kohya
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "cond_stage_model.transformer.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "clip_l.transformer.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_g.transformer.": "text_encoder_2",
}

#: part of a layer's change and its key suffixes; the first match applies
_PARTS: tuple[tuple[str, str], ...] = (
    ("down", r"lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight"),
    ("down", r"lora_A(?:\.\w+)?\.weight|lora_A|lora_embedding_A(?:\.\w+)?"),
    ("up", r"lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight"),
    ("up", r"lora_B(?:\.\w+)?\.weight|lora_B|lora_embedding_B(?:\.\w+)?"),
    ("mid", r"lora_mid\.weight"),
    ("up_bias", r"lora_B(?:\.\w+)?\.bias|lora_up\.bias"),
    ("alpha", r"alpha"),
    ("diff", r"diff|w_norm"),
    ("diff_b", r"diff_b|b_norm"),
    ("down", r"(?<=_lora\.)down\.weight"),
    ("up", r"(?<=_lora\.)up\.weight"),
)
_ENDS = [(part, re.compile(rf"^(.+?)\.(?:{end})$")) for part, end in _PARTS]

#: patterns in keys of other kinds of adapters, which change a weight by another formula
_KINDS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector",
    "BOFT": r"\.boft_",
    "OFT or BOFT": r"\.oft_",
    "IA3": r"\.on_input$|\.ia3_l",
    "GLoRA": r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$",
    "AdaLoRA": r"\.lora_E(?:\.|$)|\.ranknum",
    "VeRA": r"\.?vera_(?:lambda|A|B)",
    "RandLoRA": r"\.?randlora_",
    "HRA": r"\.hra_u",
}
_EMBEDDING = re.compile(r"^bundle_emb\.|string_to_param|^emb_params$")

#: patterns of other architectures in keys that match no layer
_ARCHITECTURES = {
    "Flux": r"double_blocks|single_blocks|single_transformer_blocks",
    "Stable Diffusion 3": r"joint_(?:blocks|transformer_blocks)",
    "SDXL": r"label_emb|add_embedding|transformer_blocks[._][1-9]",
}


def by_layer(path: Path, keys: Iterable[str], names: LayerNames) -> dict[LoraTarget, dict[str, str]]:
    """Group keys by layer and part (``down``, ``up``, ``mid``, ``up_bias``, ``alpha``, ``diff``, ``diff_b``).

    Raises:
        InputError: for another kind of adapter, another architecture, keys that match no layer, two keys for the same
            part, or a part that lacks its counterpart; the message has the first such key.
    """
    keys = list(keys)
    _refuse_other_kinds(path, keys)
    out: dict[LoraTarget, dict[str, str]] = defaultdict(dict)
    unmatched = []
    for key in keys:
        network, rest = _split_prefix(key)
        _refuse_other_network(path, key, network, names)
        part, name = _split_part(rest)
        layer = names.find(name, network) if part else None
        if layer is None:
            unmatched.append(key)
        elif part in out[layer]:
            raise InputError(f"the LoRA {path} has two keys for the same weights, {out[layer][part]} and {key}")
        else:
            out[layer][part] = key
    if unmatched:
        raise _no_layer(path, unmatched, len(keys))
    for layer, parts in out.items():
        _check_complete(path, layer, parts)
    return dict(out)


def _split_prefix(key: str) -> tuple[str | None, str]:
    """Return the network or None, and the rest of the key; prefixes may be nested: ``unet.base_model.model.``."""
    network = None
    while prefix := next((p for p in _PREFIXES if key.startswith(p)), None):
        network, key = _PREFIXES[prefix] or network, key.removeprefix(prefix)
    return network, key


def _split_part(key: str) -> tuple[str, str]:
    """Return the part and the layer's name; the part is empty if the key's suffix is unknown."""
    for part, end in _ENDS:
        if match := end.match(key):
            return part, match[1]
    return "", key


def _refuse_other_kinds(path: Path, keys: list[str]) -> None:
    for kind, mark in _KINDS.items():
        if example := next((k for k in keys if re.search(mark, k)), None):
            raise InputError(
                f"the LoRA {path} is of the kind {kind} (for example {example}), which is not supported; merge it into "
                "the checkpoint with the tool it was made with, and plug the result with --base"
            )
    if example := next((k for k in keys if _EMBEDDING.search(k)), None):
        raise InputError(
            f"the LoRA {path} contains a textual-inversion embedding ({example}), which is not supported; "
            "save it without the embedding"
        )


def _refuse_other_network(path: Path, key: str, network: str | None, names: LayerNames) -> None:
    if network is not None and network not in names.networks:
        what = (
            "is for SDXL: it changes a second text encoder" if network == "text_encoder_2" else f"changes a {network}"
        )
        raise InputError(
            f"the LoRA {path} {what} (for example {key}), and the engine's model has only "
            f"{' and '.join(names.networks)}; use a LoRA for the same architecture"
        )


def _no_layer(path: Path, keys: list[str], count: int) -> InputError:
    if len(keys) == count and not any(_split_part(_split_prefix(k)[1])[0] for k in keys):
        return InputError(
            f"{path} is not a LoRA: none of its {count} keys has a LoRA's form (for example {keys[0]}); "
            "give a checkpoint with --base"
        )
    looks = next((n for n, mark in _ARCHITECTURES.items() if any(re.search(mark, k) for k in keys)), None)
    named = f"{', '.join(sorted(keys)[:6])}{' …' if len(keys) > 6 else ''}"
    return InputError(
        f"the LoRA {path} has {len(keys)} of {count} keys that match no layer of the engine's model: {named}; "
        f"{f'it looks like a LoRA for {looks}; ' if looks else ''}use a LoRA for the same architecture"
    )


def _check_complete(path: Path, layer: LoraTarget, parts: dict[str, str]) -> None:
    key = next(iter(parts.values()))
    factors = {"down", "up"} & parts.keys()
    if len(factors) == 1 or (not factors and parts.keys() & {"mid", "up_bias", "alpha"}):
        lacking = " and ".join(
            {"down": "lora_down (A)", "up": "lora_up (B)"}[p] for p in ("down", "up") if p not in parts
        )
        raise InputError(f"the LoRA {path} is incomplete: {key} has no {lacking} for {layer}; fetch or save it again")
    if factors and "diff" in parts:
        raise InputError(
            f"the LoRA {path} has both low-rank factors and a full difference ({parts['diff']}) for {layer}"
        )

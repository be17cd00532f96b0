"""Comparison of two configs by the computation that they describe.

Configs of one architecture can differ in entries that no forward pass reads: token ids, dropout, versions, defaults
that one of them omits, ``4`` for ``[4, 4]``.  Therefore the modules created from the configs are compared: their
classes, and their attributes that are numbers, strings or functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from ..errors import InputError
from .networks import empty

#: module attributes that have no effect on a forward pass in evaluation mode and float32: those for training and
#: gradients, and `upcast_*`, which requests float32 where a half-precision type is used
_IDLE = frozenset(
    ("training", "p", "dropout", "attention_dropout", "inplace", "padding_idx", "gradient_checkpointing",
     "eos_token_id", "upcast_attention", "upcast_softmax", "config", "name_or_path", "sample_size",
     "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor", "num_upsamplers")
)  # fmt: skip
#: config entries that are read from the config itself, by diffusers' forward passes or by code around a network here
_READ = (
    "center_input_sample", "class_embed_type", "class_embeddings_concat", "addition_embed_type",
    "encoder_hid_dim_type", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
)  # fmt: skip
#: config entries that no forward pass reads
_NAMES_AND_VERSIONS = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "model_type", "dropout", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_factor", "initializer_range", "projection_dim",
    "force_upcast", "upcast_attention", "out_shape", "gradient_checkpointing", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "problem_type", "id2label", "label2id", "torchscript",
)  # fmt: skip


def check_same_network(kind: Any, config: Mapping[str, Any], expected: Mapping[str, Any], name: str, what: str) -> None:
    """Check that a fine-tune's config describes the same computation as that of the network it replaces.

    Args:
        kind: the network's class.
        config: the fine-tune's config.
        expected: the config of the network being replaced.
        name: the fine-tune, for messages.
        what: the network being replaced, for messages.

    Raises:
        InputError: if they differ; the message names the first entry that changes the computation.
    """
    if config == expected:
        return
    computed = computation(empty(kind, expected, what))
    if computation(empty(kind, config, name)) == computed:
        return
    keys = [
        k for k in sorted(config.keys() | expected.keys()) if not k.startswith("_") and config.get(k) != expected.get(k)
    ]
    for key in keys:
        if _computation(kind, _with(expected, key, config)) != computed:
            raise InputError(
                f"{name} is not a fine-tune of {what}: config entry {key} is {config.get(key)!r}, "
                f"not {expected.get(key)!r}; build it instead"
            )
    raise InputError(f"{name} is not a fine-tune of {what}: they differ in {', '.join(keys)}; build it instead")


def _computation(kind: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``computation`` of a config; None if no network can be created from it."""
    try:
        return computation(empty(kind, config, "config.json"))
    except InputError:
        return None


def _with(config: Mapping[str, Any], key: str, other: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` whose entry ``key`` is that of ``other``, or absent if it is absent there."""
    changed = {k: v for k, v in config.items() if k != key}
    return {**changed, key: other[key]} if key in other else changed


def computation(module: Any) -> dict[str, Any]:
    """Everything besides the weights that a network's forward pass depends on, by module and attribute."""
    config = dict(module.config) if hasattr(module, "from_config") else {}
    out: dict[str, Any] = {f"config.{k}": _plain(config[k]) for k in _READ if k in config}
    for path, part in module.named_modules():
        out[path] = type(part).__qualname__
        for name, value in vars(part).items():
            if not name.startswith("_") and name not in _IDLE:
                out[f"{path}.{name}"] = _plain(value)
        out |= {f"{path}.{n}": tuple(p.shape) for n, p in part.named_parameters(recurse=False)}
    return out


def _plain(value: Any) -> Any:
    """A comparable form of a value: numbers and strings unchanged, functions and other objects by their names."""
    if value is None or isinstance(value, bool | int | float):
        return value or 0  # None, False and 0 all disable an option
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    named = value if isinstance(value, type | FunctionType) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without entries that never have an effect; identifies a model without loading torch."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _NAMES_AND_VERSIONS}


def check_same_text(config: Mapping[str, Any], expected: Mapping[str, Any], name: str, what: str, kind: str) -> None:
    """``check_same_network`` for text encoders; ``kind`` is their class in transformers."""
    import transformers

    check_same_network(getattr(transformers, kind), config, expected, name, what)

"""Invalid configurations of model folders, guides and tokenizers, and invalid LoRAs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..case import BASE2, GUIDE, HERE, Case, Place
from .common import ANY, GUIDED, build, copy, plug, visualize

AREA = "configs"
MODEL, GUIDE_COPY, LORA = HERE / "model", HERE / "guide", HERE / "given.safetensors"
CONFIGS = {
    "unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json", "": "model_index.json",
}  # fmt: skip
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a":',
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "binary": b"\0\xff",
    "of NaN": b'{"sample_size": NaN, "beta_start": NaN, "scaling_factor": NaN}',
    "of a class that is a function": b'{"_class_name": "os.system", "_diffusers_version": "0"}',
    "of another class": b'{"_class_name": "FluxTransformer2DModel", "architectures": ["BertModel"]}',
    "of huge numbers": b'{"sample_size": 1e400, "in_channels": 4, "num_train_timesteps": 1e300, "hidden_size": 1e300}',
    "nested": b"[" * 100_000,
    "of 5,000 digits": b'{"sample_size": ' + b"9" * 5000 + b"}",
}
VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "U-Net of 0 channels": ("unet", {"block_out_channels": [0, 0]}),
    "U-Net of negative channels": ("unet", {"block_out_channels": [-16, 32]}),
    "U-Net of text channels": ("unet", {"block_out_channels": "x"}),
    "U-Net of 10^9 channels": ("unet", {"block_out_channels": [10**9, 10**9]}),
    "U-Net of unknown blocks": ("unet", {"down_block_types": ["Evil", "Evil"]}),
    "U-Net of 9 inputs": ("unet", {"in_channels": 9}),
    "U-Net of null inputs": ("unet", {"in_channels": None}),
    "U-Net of 0 heads": ("unet", {"attention_head_dim": 0}),
    "U-Net of a sample of 0": ("unet", {"sample_size": 0}),
    "U-Net of a text sample": ("unet", {"sample_size": "x"}),
    "U-Net with code of its own": ("unet", {"auto_map": {"AutoModel": "evil.py--Evil"}}),
    "U-Net of an unknown activation": ("unet", {"act_fn": "evil"}),
    "VAE of 0 latents": ("vae", {"latent_channels": 0}),
    "VAE of a text scale": ("vae", {"scaling_factor": "x"}),
    "VAE of a scale of 0": ("vae", {"scaling_factor": 0.0}),
    "text encoder of no words": ("text_encoder", {"vocab_size": 0}),
    "text encoder of 10^12 words": ("text_encoder", {"vocab_size": 10**12}),
    "text encoder of 0 heads": ("text_encoder", {"num_attention_heads": 0}),
    "text encoder of another kind": ("text_encoder", {"architectures": ["T5EncoderModel"], "model_type": "t5"}),
    "scheduler of 0 time steps": ("scheduler", {"num_train_timesteps": 0}),
    "scheduler of text time steps": ("scheduler", {"num_train_timesteps": "x"}),
    "scheduler of a NaN beta": ("scheduler", {"beta_start": float("nan")}),
    "scheduler of a beta of 5": ("scheduler", {"beta_end": 5.0}),
    "scheduler of an unknown schedule": ("scheduler", {"beta_schedule": "evil"}),
    "scheduler of an unknown prediction": ("scheduler", {"prediction_type": "evil"}),
    "scheduler of an unknown class": ("scheduler", {"_class_name": "EvilScheduler"}),
    "tokenizer of 0 tokens": ("tokenizer", {"model_max_length": 0}),
    "tokenizer of 10^30 tokens": ("tokenizer", {"model_max_length": 10**30}),
    "tokenizer of text tokens": ("tokenizer", {"model_max_length": "x"}),
    "tokenizer of another class": ("tokenizer", {"tokenizer_class": "Evil"}),
    "index of unknown parts": ("", {"unet": ["evil", "Evil"]}),
    "index of numbers": ("", {"unet": 1, "vae": 2}),
}


def _text(part: str, text: bytes) -> Callable[[Place], None]:
    return lambda place: _ignore((copy(place, BASE2, MODEL) / part / CONFIGS[part]).write_bytes(text))


def _values(part: str, values: dict[str, Any]) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        path = copy(place, BASE2, MODEL) / part / CONFIGS[part]
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return prepare


GUIDES: dict[str, dict[str, Any]] = {
    "of an unknown class": {"_class_name": "Evil"},
    "of rank 0": {"rank": 0},
    "of a text rank": {"rank": "x"},
    "of rank 10^9": {"rank": 10**9},
    "of an unknown option": {"evil": 1},
    "of text channels": {"channels": "x"},
    "of null channels": {"channels": None},
    "of NaN": {"w_min": float("nan"), "embed_dim": float("nan")},
}


def _guide(change: dict[str, Any] | bytes) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        path = copy(place, GUIDE, GUIDE_COPY) / "config.json"
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return prepare


def _ignore(_: object) -> None:
    return None


KEY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
Tensors = dict[str, np.ndarray]


def _pair(rank: int = 2, rows: int = 32, columns: int = 32, fill: float = 0.01) -> Tensors:
    return {
        f"{KEY}.lora_A.weight": np.full((rank, columns), fill, np.float32),
        f"{KEY}.lora_B.weight": np.full((rows, rank), fill, np.float32),
    }


LORAS: dict[str, Tensors] = {
    "of nothing": {},
    "of NaN": _pair(fill=float("nan")),
    "of infinities": _pair(fill=float("inf")),
    "of 1e30": _pair(fill=1e30),
    "of other rows": _pair(rows=7),
    "of other columns": _pair(columns=7),
    "of rank 0": _pair(rank=0),
    "of factors that do not meet": _pair() | {f"{KEY}.lora_B.weight": np.zeros((32, 3), np.float32)},
    "of one factor": {f"{KEY}.lora_A.weight": np.zeros((2, 32), np.float32)},
    "of scalars": {k: np.array(1, np.float32) for k in _pair()},
    "of whole numbers": {k: v.astype(np.int32) for k, v in _pair().items()},
    "of three dimensions": {k: v[None] for k, v in _pair().items()},
    "of unknown layers": {f"unet.evil.{n}.lora_A.weight": np.zeros((2, 2), np.float32) for n in range(3)},
    "of another network": {f"transformer.{k}": v for k, v in _pair().items()},
    "of an alpha of NaN": _pair() | {f"{KEY}.alpha": np.array(np.nan, np.float32)},
    "of an alpha that is a vector": _pair() | {f"{KEY}.alpha": np.ones(5, np.float32)},
    "of two kinds of names": _pair()
    | {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.zeros((2, 32), np.float32)},
    "of names that escape": {"unet.\x1b]0;x\x07.lora_A.weight": np.zeros((2, 2), np.float32)},
    "of names that climb": {"unet.../../evil.lora_A.weight": np.zeros((2, 2), np.float32)},
    "of a name of 10,000 letters": {"unet." + "x" * 10_000 + ".lora_A.weight": np.zeros((2, 2), np.float32)},
    "of 5,000 unknown layers": {f"unet.evil{n}.lora_A.weight": np.zeros((1, 1), np.float32) for n in range(5000)},
    "of a whole U-Net's names": {"conv_in.weight": np.zeros((16, 4, 3, 3), np.float32)},
}
SCALES = ("nan", "inf", "1e400", "", "x", "0,8", "-1e308", "1:2", " 1", "٣")


def _lora(tensors: Tensors, metadata: dict[str, str] | None = None) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        from safetensors.numpy import save_file

        save_file(tensors, place.path(LORA), metadata)

    return prepare


def cases() -> Iterator[Case]:
    """All cases."""
    for n, part in enumerate(CONFIGS):
        for turn, (label, text) in enumerate(TEXTS.items(), n):
            name = f"{part or 'model'}'s config is {label}"
            if turn % 3:
                yield Case(AREA, f"plug, {name}", plug(base=MODEL), ANY, _text(part, text))
            else:
                yield Case(AREA, f"build, {name}", build(base=MODEL), ANY, _text(part, text), slow=True)
    for turn, (label, (part, values)) in enumerate(VALUES.items()):
        yield Case(AREA, f"plug, a {label}", plug(base=MODEL), ANY, _values(part, values))
        if turn % 2 == 0:
            yield Case(AREA, f"build, a {label}", build(base=MODEL), ANY, _values(part, values), slow=True)
    for label, change in GUIDES.items():
        yield Case(AREA, f"visualize, a guide {label}", visualize(guide=GUIDE_COPY), ANY, _guide(change))
        yield Case(AREA, f"build, a guide {label}", build(guide=GUIDE_COPY), ANY, _guide(change), slow=True)
    for label, text in TEXTS.items():
        yield Case(AREA, f"visualize, a guide's config is {label}", visualize(guide=GUIDE_COPY), (1, 2), _guide(text))
    for label, tensors in LORAS.items():
        allowed = ANY if label in ("of an alpha that is a vector", "of 1e30") else (1, 2)
        yield Case("LoRAs", f"plug, a LoRA {label}", plug(GUIDED, "--lora", LORA), allowed, _lora(tensors))
    for scale in SCALES:
        yield Case(
            "LoRAs", f"plug --lora FILE:{scale}", plug(GUIDED, "--lora", LORA + f":{scale}"), ANY, _lora(_pair())
        )
    for label, metadata in {
        "no JSON": {"lora_adapter_metadata": "{"}, "a list": {"lora_adapter_metadata": "[]"},
        "nested": {"lora_adapter_metadata": "[" * 50_000}, "an alpha of text": {"ss_network_alpha": "x"},
        "a rank of NaN": {"ss_network_dim": "nan", "lora_adapter_metadata": '{"unet.r": NaN, "unet.lora_alpha": NaN}'},
        "a code": {"lora_adapter_metadata": '{"unet.auto_mapping": "os.system"}'},
    }.items():  # fmt: skip
        yield Case(
            "LoRAs", f"plug, a LoRA's metadata is {label}", plug(GUIDED, "--lora", LORA), ANY, _lora(_pair(), metadata)
        )

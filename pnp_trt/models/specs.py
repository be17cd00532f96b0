"""Specifications of a base model's networks.  Importing this does not load torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextEncoderSpec:
    """One of a family's text encoders.

    Attributes:
        name: name of the network in bundles and of its folder.
        tokenizer: folder of its tokenizer.
        kind: its class in transformers.
        wrapper: class in ``models.wrappers`` that is exported.
        outputs: names of the exported module's outputs: the states, then further inputs of the U-Net, by their names
            there.
        whole: whether the outputs depend on all of its weights.
        title: name in messages.
    """

    name: str = "text_encoder"
    tokenizer: str = "tokenizer"
    kind: str = "CLIPTextModel"
    wrapper: str = "TextEncoder"
    outputs: tuple[str, ...] = ("last_hidden_state",)
    whole: bool = True
    title: str = "text encoder"


@dataclass(frozen=True)
class Layout:
    """Location and naming of a text encoder in single-file checkpoints.

    Attributes:
        network: the text encoder's name.
        names: naming scheme of its weights, ``clip`` (transformers) or ``open_clip``.
        prefix: pattern of the prefix of its keys, without wrappers of training code.
    """

    network: str
    names: str
    prefix: str


#: titles of networks, common to all families
TITLES = {
    "condition": "guide's condition", "sharpener": "guide's sharpener",
    "unet": "U-Net", "vae_decoder": "VAE decoder", "vae_encoder": "VAE encoder",
}  # fmt: skip


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a bundle.

    Attributes:
        title: name in messages.
        module: creates the module that is exported; calling it loads the weights.
        outputs: names of its outputs.
        sized: whether its inputs depend on the image size.
        one_by_one: whether it is run on one row at a time.
        decodes: whether it is an autoencoder's decoder; if so, half precision is also evaluated on latents of images.
    """

    title: str
    module: Callable[[], Any]
    outputs: tuple[str, ...]
    sized: bool = True
    one_by_one: bool = False
    decodes: bool = False

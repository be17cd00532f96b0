"""What a base model states of each of its networks.  Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextEncoderSpec:
    """One of a family's text encoders.

    Attributes:
        name: of its network in bundles, and of its folder.
        tokenizer: folder of its tokenizer.
        kind: its class in transformers.
        wrapper: class of ``models.wrappers`` by which it is exported.
        outputs: names of the exported module's outputs: the states, then inputs of the U-Net by their names there.
        whole: whether the outputs depend on all of its weights.
        title: for messages.
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
    """Where checkpoints in one file hold a text encoder.

    Attributes:
        network: the text encoder's name.
        names: whose names its weights have, ``clip`` (transformers) or ``open_clip``.
        prefix: pattern of what stands before them, wrappers of training code apart.
    """

    network: str
    names: str
    prefix: str


#: titles of networks that every family has
TITLES = {
    "condition": "guide's condition", "sharpener": "guide's sharpener",
    "unet": "U-Net", "vae_decoder": "VAE decoder", "vae_encoder": "VAE encoder",
}  # fmt: skip


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a bundle.

    Attributes:
        title: for messages.
        module: makes the module that is exported; calling it loads the weights.
        outputs: names of its outputs.
        sized: whether its inputs depend on the image's size.
        one_by_one: whether it is run for one row at a time.
        decodes: whether it is an autoencoder's decoder; half precision is judged on latents of images too then.
    """

    title: str
    module: Callable[[], Any]
    outputs: tuple[str, ...]
    sized: bool = True
    one_by_one: bool = False
    decodes: bool = False

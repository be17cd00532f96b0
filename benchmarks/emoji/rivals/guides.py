"""The guides of this repository as rivals, and the tiny one on sharpened text."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pnp_trt.models.guides import GUIDES
from pnp_trt.models.student import encode

from ..gpu_train import TINY_OPTIONS, guided
from .adapters import Adapters, AdditiveAdapter
from .base import Encoded, Rival
from .sharpener import Sharpener, sharpen


class _Guided(Rival):
    """A guide on the features of the frozen encoder."""

    kind: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.guide = GUIDES[self.kind].from_unet(unet, **self.options)

    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        return guided(unet, self.guide)(x, t, text, w, encode(unet, x, t, text) if encoded is None else encoded)


class TinyRival(_Guided):
    title: ClassVar[str] = "tiny guide (ours)"
    source: ClassVar[str] = "This repository's tiny guide: low-rank residuals for the decoder's skips and mid block."
    lr: ClassVar[float] = 3e-3
    kind: ClassVar[str] = "tiny"
    options: ClassVar[dict[str, Any]] = TINY_OPTIONS


class FullRival(_Guided):
    title: ClassVar[str] = "full guide"
    source: ClassVar[str] = (
        "Hsiao et al., CVPR 2024, “Plug-and-Play Diffusion Distillation” (arXiv 2406.01954): a ControlNet of the "
        "teacher's encoder. Its parameters are many times the others'."
    )
    lr: ClassVar[float] = 3e-4
    kind: ClassVar[str] = "full"


class TinyAndSharpener(TinyRival):
    """The tiny guide and the sharpener, trained together; the guide reads the encoder's features of sharpened text."""

    title: ClassVar[str] = "tiny guide + sharpener (ours)"
    source: ClassVar[str] = (
        "The tiny guide and the sharpener, trained jointly. It has the parameters of both; the sharpener's cost "
        "nothing in an evaluation."
    )
    once: ClassVar[str | None] = "sharpener"
    reads_negative: ClassVar[bool] = True

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.sharpener = Sharpener(unet.config.cross_attention_dim)

    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        return super().forward(unet, x, t, sharpen(self.sharpener, text, empty, w), empty, w)


class TinyAndOffsets(TinyRival):
    """The tiny guide and offsets that depend on the prompt, w and t only, trained together."""

    title: ClassVar[str] = "tiny guide + offsets (ours)"
    source: ClassVar[str] = (
        "The tiny guide and AGD's additive adapters, trained jointly. The offsets depend only on the prompt, w and t, "
        "so they can be tabulated before the loop. It has the parameters of both."
    )

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.offsets = Adapters(unet, AdditiveAdapter)

    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        # the encoder is evaluated again, because its features depend on the offsets
        with self.offsets.attached(unet, x, t, text, w):
            return super().forward(unet, x, t, text, empty, w)


class TinySharpenerAndOffsets(TinyAndOffsets, TinyAndSharpener):
    """The tiny guide, the sharpener and the offsets, trained together."""

    title: ClassVar[str] = "tiny guide + sharpener + offsets (ours)"
    source: ClassVar[str] = (
        "The tiny guide, the sharpener and AGD's additive adapters, trained jointly. It has the parameters of all "
        "three."
    )

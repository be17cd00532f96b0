"""Models of Stable Diffusion XL: the differences from Stable Diffusion 1 and 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ...files import read_json
from ...specs import TextEncoderSpec
from ...teacher import BaseModel

#: padding token of the second tokenizer
PAD = "!"
#: both encoders output the states before their last layer; the U-Net also takes the second one's projected text
TEXT_ENCODERS = (
    TextEncoderSpec(wrapper="HiddenStates", outputs=("hidden_states",), whole=False),
    TextEncoderSpec(
        "text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "ProjectedStates",
        ("hidden_states", "text_embeds"), title="second text encoder",
    ),
)  # fmt: skip


class SdxlBase(BaseModel):
    """A teacher of Stable Diffusion XL; see :class:`~pnp_trt.models.teacher.BaseModel`."""

    family: ClassVar[str] = "sdxl"
    text_specs: ClassVar[tuple[TextEncoderSpec, ...]] = TEXT_ENCODERS
    unet_additions: ClassVar[tuple[str | None, ...]] = ("text_time",)
    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"

    def zero_empty_prompt(self) -> bool:
        """``force_zeros_for_empty_prompt`` of the folder's ``model_index.json``; true if it is not stated."""
        index = self.folder / "model_index.json"
        return bool(read_json(index).get("force_zeros_for_empty_prompt", True)) if index.is_file() else True

    def tokenizer_folder(self, spec: TextEncoderSpec) -> Path:
        """The encoder's own tokenizer, or the first one's, of the same vocabulary, if the model has none for it."""
        own = super().tokenizer_folder(spec)
        return own if own.is_dir() else super().tokenizer_folder(self.text_specs[0])

    def tokenizer(self, spec: TextEncoderSpec | None = None) -> Any:
        """As in ``BaseModel``; if the second encoder uses the first's tokenizer, it pads with ``!``, like OpenCLIP."""
        spec = spec or self.text_specs[0]
        tokenizer = super().tokenizer(spec)
        if spec != self.text_specs[0] and self.tokenizer_folder(spec).name != spec.tokenizer:
            tokenizer.pad_token = PAD
        return tokenizer

    def golden_added(self, generator: Any, rows: int, size: tuple[int, int]) -> dict[str, Any]:
        """Unit normal pooled text, and two images' sizes: an uncropped image, and a crop of a larger one."""
        import torch

        width = int(self.config(self.text_specs[-1].name)["projection_dim"])
        sizes = [[*size, 0, 0, *size], [2 * size[0], 3 * size[1], size[0] // 2, size[1] // 4, *size]]
        return {
            "text_embeds": torch.randn(rows, width, generator=generator),
            "time_ids": torch.tensor(sizes, dtype=torch.float32)[:rows],
        }

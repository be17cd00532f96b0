"""Guides in diffusers pipelines: after ``apply_guide(pipe, "emoji-tiny")``, CFG takes one evaluation per step.

If a U-Net's config has ``time_cond_proj_dim``, diffusers' pipelines run no CFG of their own, but pass the U-Net an
embedding of w − 1 as ``timestep_cond`` (introduced for latent consistency models, arXiv 2310.04378).  A guided U-Net is
declared as such a U-Net and recovers w from the embedding, so that every call of every pipeline can have its own w.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.guides import Guide
from ..models.guides.load import load_guide
from ..models.student import Student
from ..runtime.pipeline import GUIDANCE

#: width of the embedding of w: sines, then cosines, of (w − 1) times each of the rates
WIDTH = 10
_RATES = (1000.0, 100.0, 10.0, 1.0, 0.1)


def apply_guide(pipe: Any, guide: str | Path | Guide, *, negative: str | None = None) -> Any:
    """Add a guide to a diffusers pipeline, so that ``pipe(prompt, guidance_scale=w)`` takes one evaluation per step.

    Everything else is unchanged: schedulers, callbacks and other pipelines with the same components.  Without a second
    evaluation, diffusers ignores ``negative_prompt`` and ``guidance_rescale``.

    Args:
        pipe: ``StableDiffusionPipeline``, ``StableDiffusionXLPipeline``, or another that runs CFG with its ``unet``.
        guide: the name of a bundled guide, a folder, or a guide.
        negative: negative prompt for all images, for a guide that was distilled with negative prompts; None means the
            empty prompt.

    Returns:
        The pipeline.

    Raises:
        InputError: if the guide is unknown or was made for another U-Net, or if the pipeline is not supported.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(pipe, "get_guidance_scale_embedding"):
        raise InputError(
            f"{type(pipe).__name__} does not leave guidance to its U-Net; use a StableDiffusionPipeline or a "
            "StableDiffusionXLPipeline, or an image-to-image one of either"
        )
    if isinstance(unet, GuidedUNet):
        unet = unet.unet
    if unet.config.time_cond_proj_dim is not None:
        raise InputError("this U-Net was distilled to take w itself (time_cond_proj_dim is set); it needs no guide")
    loaded = load_guide(str(guide)) if isinstance(guide, str | Path) else guide
    if negative is not None and not loaded.negative_prompts:
        raise InputError(
            f"negative is '{negative}', but the guide was distilled without negative prompts; omit it, or distil a "
            "guide with --negative 0.3"
        )
    loaded.to(unet.device, unet.dtype).eval().requires_grad_(False)
    states = _states(pipe, negative or "") if loaded.negative_prompts else None
    pipe.unet = GuidedUNet(unet, loaded, states, None if loaded.sharpener is None else _empty(pipe))
    pipe.save_pretrained = _refuse_to_save  # diffusers would omit the U-Net with only a warning
    return pipe


def remove_guide(pipe: Any) -> Any:
    """Restore a pipeline's own U-Net, and with it CFG; do nothing if the pipeline has no guide.

    Returns:
        The pipeline.
    """
    if isinstance(getattr(pipe, "unet", None), GuidedUNet):
        pipe.unet = pipe.unet.unet
        vars(pipe).pop("save_pretrained", None)
    return pipe


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InputError("a pipeline with a guide cannot be saved; call remove_guide(pipe) first")


class GuidedUNet(nn.Module):
    """A U-Net with a guide, which replaces a pipeline's U-Net and forwards unknown attributes to it.

    Args:
        unet: the pipeline's U-Net.
        guide: the guide, on the U-Net's device and with its type.
        negative: text states ``[1, tokens, D]`` of the negative prompt, for a guide that reads them.
        empty: text states of the empty prompt, for a guide with a sharpener.

    Raises:
        InputError: if the guide was made for another U-Net.
    """

    def __init__(self, unet: Any, guide: Guide, negative: Tensor | None = None, empty: Tensor | None = None) -> None:
        super().__init__()
        self.student = Student(unet, guide)
        self.register_buffer("negative", negative, persistent=False)
        self.register_buffer("empty", empty, persistent=False)
        # cache of one pipeline call: the embedding of w, the sample's shape, w, and the part of the guide that depends
        # only on w
        self._call: tuple[Tensor, tuple[int, ...], Tensor, Tensor | None] | None = None

    @property
    def unet(self) -> Any:
        """The pipeline's own U-Net."""
        student: Any = self.student
        return student.unet

    @property
    def config(self) -> Any:
        """The U-Net's config, with the width of the embedding of w."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict({**self.unet.config, "time_cond_proj_dim": WIDTH})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student: Any = super().__getattr__("student")
            return getattr(student.unet, name)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the guided prediction ``[B, C, H, W]``; the arguments are those of ``UNet2DConditionModel.forward``.

        Raises:
            InputError: without ``timestep_cond``, for w outside 1 … 9, or for inputs that guides do not support
                (ControlNets, IP adapters, attention arguments).
        """
        if unsupported := [name for name, value in others.items() if value is not None]:
            raise InputError(f"a guided U-Net takes no {', '.join(unsupported)}; remove_guide(pipe) restores plain CFG")
        if self.unet.encoder_hid_proj is not None:
            raise InputError("a guided U-Net takes no IP adapter; unload it, or call remove_guide(pipe)")
        if timestep_cond is None:
            raise InputError("the pipeline passed no timestep_cond, which a guided U-Net needs to read w")
        w, condition = self._of_call(timestep_cond, sample)
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        negative, empty = (
            None if states is None else states.to(sample.dtype).expand(len(sample), -1, -1)
            for states in (self.negative, self.empty)
        )
        out = self.student(
            sample, t, encoder_hidden_states, w, negative=negative, empty=empty,
            condition=condition, added_cond_kwargs=added_cond_kwargs or None,
        )  # fmt: skip
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)

    def _of_call(self, embedding: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """w ``[B]`` and the guide's condition, computed once per call, because reading w synchronises with the GPU."""
        if self._call is None or self._call[0] is not embedding or self._call[1] != sample.shape:
            w = read_guidance(embedding)
            for value in w.tolist():
                if not GUIDANCE[0] <= value <= GUIDANCE[1]:
                    raise InputError(
                        f"guidance_scale is {value:g}; it must be between {GUIDANCE[0]:g} and {GUIDANCE[1]:g}"
                    )
            size = (sample.shape[-2], sample.shape[-1])
            condition = self.student.guide.condition(w, size)
            self._call = embedding, tuple(sample.shape), w, condition
        return self._call[2], self._call[3]


def read_guidance(embedding: Tensor) -> Tensor:
    """Return w ``[B]``, float32 to five decimals, from diffusers' embedding ``[B, 10]`` of w − 1, for w up to 30.

    The slowest angle gives a rough w. Each faster angle, whose full turns follow from the estimate so far, refines it
    tenfold. Half precision is therefore sufficient.
    """
    sines, cosines = embedding.double().chunk(2, dim=-1)
    angles = torch.atan2(sines, cosines)
    estimate = angles[:, -1] / _RATES[-1]
    for i in range(len(_RATES) - 2, -1, -1):
        turns = torch.round((estimate * _RATES[i] - angles[:, i]) / (2 * math.pi))
        estimate = (angles[:, i] + 2 * math.pi * turns) / _RATES[i]
    return torch.round(estimate + 1, decimals=5).float()


@torch.no_grad()
def _states(pipe: Any, prompt: str) -> Tensor:
    """Text states ``[1, tokens, D]`` of a prompt, from the pipeline's own encoder."""
    states: Tensor = pipe.encode_prompt(
        prompt, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    return states


def _empty(pipe: Any) -> Tensor:
    """Text states ``[1, tokens, D]`` of the empty prompt in CFG: zeros for models trained with zeros."""
    states = _states(pipe, "")
    return torch.zeros_like(states) if getattr(pipe.config, "force_zeros_for_empty_prompt", False) else states

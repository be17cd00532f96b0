"""The base class of guides, used by the exporter, the trainer and the reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from ...errors import InputError
from .parts import GainTable, GuideInput, GuideOutput, strength


class Guide(ModelMixin, ConfigMixin):
    """A network that adds guidance to a frozen U-Net's skips and mid block.

    A guide is a subclass registered in ``GUIDES``.  Its ``__init__`` is decorated with diffusers'
    ``register_to_config`` and takes at least the members of ``parts.signature``, the shapes of the U-Nets that it fits.
    Its residuals are zero at w = 1 (``parts.strength``).  Optional arguments of ``__init__`` enable features:

    - ``negative_prompts``: distillation with negative prompts.
    - ``sampling_steps``: distillation for a number of steps (stage 2).
    - ``gain``: ``pnp-trt distill gain``.  The class creates ``gain_table`` from it and multiplies its residuals by
      :meth:`gate`.
    - ``sharpener_width``: ``pnp-trt distill guidance --sharpen``.  The class creates ``sharpener`` from it.

    Attributes:
        gain_table: g(t), or None for a factor of one.
        sharpener: module that changes the prompt's text states by a negative prompt (``sharpener.Sharpener``), or None.
            In a bundle it is a separate network, which runs once per image with a negative prompt.
        side_by_side: whether parts of equal shape are computed as one tensor, if the class supports it: the same
            values in fewer operations.
        constant_parts: names of the modules and parameters that :meth:`condition` uses; in a bundle they are a
            separate network, which runs once per image.
        quantised_layers: patterns (``fnmatch``) of its layers that ``pnp-trt calibrate`` considers for INT8.
        size_options: options of :meth:`from_unet` that determine its size; ``pnp-trt bench`` counts operations with a
            bundled guide's values of them.
    """

    constant_parts: tuple[str, ...] = ()
    quantised_layers: ClassVar[tuple[str, ...]] = ()
    size_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        # not named gain: that is the config's entry, and diffusers looks attributes up in the config first
        self.gain_table: GainTable | None = None
        self.sharpener: nn.Module | None = None
        self.side_by_side = False

    @classmethod
    def from_unet(cls, unet: Any, **options: Any) -> Guide:
        """Create a guide that fits ``unet``, a ``UNet2DConditionModel``; its residuals are zero until it is trained."""
        raise NotImplementedError(f"{cls.__name__} defines no from_unet")

    @property
    def negative_prompts(self) -> bool:
        """Whether it supports negative prompts: by ``GuideInput.negative``, or by a sharpener."""
        return bool(self.config.get("negative_prompts")) or self.sharpener is not None

    @property
    def sampling_steps(self) -> int | None:
        """The only number of sampling steps that it was distilled for (stage 2); None for any."""
        steps: int | None = self.config.get("sampling_steps")
        return steps

    def use_gain(self, values: Sequence[float] | None) -> None:
        """Set the table that the residuals are multiplied by (:class:`GainTable`); None removes it.

        Raises:
            InputError: if the values are invalid, or the guide's class does not support ``gain``.
        """
        if "gain" not in self.config:
            raise InputError(f"a {type(self).__name__} does not support gain; see Guide.use_gain")
        table = None if values is None else GainTable(list(values))
        self.register_to_config(gain=None if values is None else list(values))
        self.gain_table = None if table is None else table.to(next(self.parameters()).device)

    def gate(self, inputs: GuideInput, dtype: torch.dtype) -> Tensor:
        """Factor of the residuals, ``[B, 1, 1, 1]``: (w − 1) / 4 · g(t)."""
        return strength(inputs.guidance, dtype, None if self.gain_table is None else self.gain_table(inputs.timestep))

    def condition(self, guidance: Tensor, latent_size: tuple[int, int]) -> Tensor | None:
        """Compute the part that depends only on w, ``guidance [B]``: ``[B, C_0, H, W]`` for latents of size (H, W).

        None for guides without ``constant_parts``.
        """
        return None

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass, if the guide is large enough for that to matter."""

    def forward(self, inputs: GuideInput) -> GuideOutput:
        """Residuals for one step; see :class:`GuideInput`."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

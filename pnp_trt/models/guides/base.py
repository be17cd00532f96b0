"""What every guide is: the base class that the exporter, the trainer and the reports read."""

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
    ``register_to_config`` and takes at least the members of ``parts.signature``, which tie it to its U-Nets; with
    ``negative_prompts`` and ``sampling_steps`` among its arguments, it can be distilled with negative prompts and for
    a number of steps (stage 2).  Its residuals vanish at w = 1 (``parts.strength``).  One that takes ``gain`` makes its
    ``gain_table`` of it and multiplies its residuals by :meth:`gate`; ``pnp-trt distill gain`` then serves it too.  One
    that takes ``sharpener_width`` makes its ``sharpener`` of it; ``pnp-trt distill guidance --sharpen`` then serves it.

    Attributes:
        gain_table: g(t), or None for a factor of one.
        sharpener: what changes the prompt's text states by a negative prompt (``sharpener.Sharpener``); a bundle holds
            it as a network of its own, which runs once per image that has a negative prompt.  None without.
        side_by_side: whether parts of equal shape are computed as one tensor, where the class supports it: the same
            values in fewer operations.
        constant_parts: names of its modules and parameters that :meth:`condition` runs; a bundle holds them as a
            network of its own, which runs once per image.
        quantised_layers: patterns (``fnmatch``) of its layers that ``pnp-trt calibrate`` considers for INT8.
        size_options: options of :meth:`from_unet` that decide its size; a bundled guide's values are those that
            ``pnp-trt bench`` counts.
    """

    constant_parts: tuple[str, ...] = ()
    quantised_layers: ClassVar[tuple[str, ...]] = ()
    size_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        # the config's entry is called gain, and diffusers answers a module's name from the config first
        self.gain_table: GainTable | None = None
        self.sharpener: nn.Module | None = None
        self.side_by_side = False

    @classmethod
    def from_unet(cls, unet: Any, **options: Any) -> Guide:
        """A new guide that fits ``unet``, a ``UNet2DConditionModel``; its residuals are zero until it is trained."""
        raise NotImplementedError(f"{cls.__name__} defines no from_unet")

    @property
    def negative_prompts(self) -> bool:
        """Whether negative prompts change its guidance: it reads ``GuideInput.negative``, or has a sharpener."""
        return bool(self.config.get("negative_prompts")) or self.sharpener is not None

    @property
    def sampling_steps(self) -> int | None:
        """The only number of sampling steps that it was distilled for (stage 2); None for any."""
        steps: int | None = self.config.get("sampling_steps")
        return steps

    def use_gain(self, values: Sequence[float] | None) -> None:
        """Multiply the residuals by the table ``values`` (:class:`GainTable`) and no former one; None: by one.

        Raises:
            InputError: for a table that is not one, or a guide whose class takes no ``gain``.
        """
        if "gain" not in self.config:
            raise InputError(f"a {type(self).__name__} takes no gain; see Guide.use_gain")
        table = None if values is None else GainTable(list(values))
        self.register_to_config(gain=None if values is None else list(values))
        self.gain_table = None if table is None else table.to(next(self.parameters()).device)

    def gate(self, given: GuideInput, dtype: torch.dtype) -> Tensor:
        """What the residuals are multiplied by, ``[B, 1, 1, 1]``: (w − 1) / 4 · g(t)."""
        return strength(given.guidance, dtype, None if self.gain_table is None else self.gain_table(given.timestep))

    def condition(self, guidance: Tensor, latent_size: tuple[int, int]) -> Tensor | None:
        """What depends on the scales ``guidance [B]`` alone, ``[B, C_0, H, W]`` for latents of size (H, W).

        None for guides without ``constant_parts``.
        """
        return None

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass where the guide is large enough for that to matter."""

    def forward(self, given: GuideInput) -> GuideOutput:
        """Residuals for one step; see :class:`GuideInput`."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

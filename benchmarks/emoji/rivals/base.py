"""Base class of the rivals: modules that predict eps_w by one evaluation of a frozen U-Net."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from pnp_trt.errors import InputError
from pnp_trt.models.guides.parts import Features, signature

#: time embedding ``[B, E]`` and features of the frozen encoder
Encoded = tuple[Tensor, Features]
#: a forward hook: (module, its positional arguments, its output) → the output to use
Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


class Rival(nn.Module, ABC):
    """One way to put guidance into one evaluation; the U-Net is an argument, so that fine-tunes can replace it.

    A rival's change is multiplied by (w − 1), like the guides' residuals, so that at w = 1 the prediction is exactly
    the U-Net's.  Its last projections start at zero, so that an untrained rival has no effect at any w.

    Attributes:
        title: name in tables.
        source: the paper that it follows, and differences from it.
        lr: peak learning rate of AdamW.
        once: name of the submodule that runs on (text, empty) once per image instead of in every evaluation.
        reads_negative: whether the prediction depends on ``empty``, so that a negative prompt can take its place.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    lr: ClassVar[float] = 1e-3
    once: ClassVar[str | None] = None
    reads_negative: ClassVar[bool] = False

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.shape = signature(unet)

    @classmethod
    def from_unet(cls, unet: Any) -> Self:
        """An untrained rival that fits ``unet``, a ``UNet2DConditionModel``, and others of its shape."""
        return cls(unet)

    def check(self, unet: Any) -> None:
        """Raise ``InputError`` if ``unet`` differs in shape from the U-Net that the rival was created for."""
        actual = signature(unet)
        for name, value in self.shape.items():
            if actual[name] != value:
                raise InputError(
                    f"the rival was created for a U-Net with {name} = {value}, but this one has {actual[name]}; "
                    "use a fine-tune of the same base"
                )

    @abstractmethod
    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        """The guided prediction ``[B, C, H, W]``, by one evaluation of ``unet``.

        Args:
            unet: the frozen base or a fine-tune of it; its weights are not changed.
            x: noisy latents ``[B, C, H, W]``.
            t: timesteps ``[B]``.
            text: states of the prompt, ``[B, tokens, D]``.
            empty: states of the negative or empty prompt, ``[B, tokens, D]``.
            w: the scale, ``[B]``.
            encoded: ``student.encode(unet, x, t, text)`` if the caller has it; only guides can use it.
        """


@contextmanager
def hooked(unet: Any, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
    """Replace the outputs of the named submodules of ``unet`` by those of the hooks within the block."""
    handles = [unet.get_submodule(name).register_forward_hook(hook) for name, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cross_attentions(unet: Any) -> list[tuple[str, int]]:
    """Name and channels of every cross-attention, in the order of ``named_modules``."""
    return [(name, m.to_q.in_features) for name, m in unet.named_modules() if name.endswith(".attn2")]


def time_width(unet: Any) -> int:
    """Width E of the time embedding."""
    width: int = unet.time_embedding.linear_2.out_features
    return width

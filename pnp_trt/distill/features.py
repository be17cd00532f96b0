"""Feature matching: an extra loss term on the decoder's features before its last convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .run import TeacherModel
from .states import States


class _Tap:
    """Context manager that records the input of a module's last call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.input: Tensor | None = None

    def __enter__(self) -> _Tap:
        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            self.input = args[0]

        self._handle = self._module.register_forward_pre_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def feature_error(model: nn.Module, teacher: TeacherModel, states: States, rows: Tensor, w: Tensor) -> Tensor:
    """Mean squared error of the last decoder block's features against the guided teacher's f_u + w·(f_c − f_u), over w.

    The features are those before the last norm, where the guided combination is linear in w, like the prediction's
    target.  This evaluates the teacher twice and the student once more.
    """
    from .monitor import predict_states

    unet = teacher.unet
    device = w.device
    prompt, negative = states.prompt[rows], states.negative[rows]
    c = teacher.conditions
    x, t = states.sample[rows].float().to(device), states.timestep[rows].to(device)
    with torch.no_grad(), _Tap(unet.conv_norm_out) as tap:
        unet(
            torch.cat([x, x]), torch.cat([t, t]), c.text(torch.cat([negative, prompt]), device),
            added_cond_kwargs=c.added(torch.cat([negative, prompt]), device),
        )  # fmt: skip
        assert tap.input is not None
        plain, conditional = tap.input.float().chunk(2)
    with _Tap(unet.conv_norm_out) as tap:
        predict_states(model, states, rows, w)
        assert tap.input is not None
        features = tap.input.float()
    scale = w[:, None, None, None]
    return ((features - plain - scale * (conditional - plain)) ** 2 / scale).mean()

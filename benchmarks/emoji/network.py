"""A U-Net, with or without a guide, made fast for thousands of evaluations: bfloat16 and compiled if possible.

On a processor with bfloat16 instructions, a frozen compiled bfloat16 U-Net is several times faster than the float32
one.  It is used only if its images are indistinguishable from float32's; the record contains the measurements.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnp_trt.bench.metrics import fidelity
from pnp_trt.models.student import Student
from pnp_trt.processor import multiplies

from .sampler import BATCH, SAME_TO_THE_EYE, Predict

FLOAT32, BFLOAT16, MIXED = "float32", "bfloat16", "bfloat16, guide in float32"


class _Plain(nn.Module):
    """A U-Net with the student's calling convention; w is ignored."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        return self.unet(x, t, text, return_dict=False)[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors inside tuples, lists and dataclasses to another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_cast(getattr(value, f.name), dtype) for f in dataclasses.fields(value)))
    return value


def _in_float32(guide: Any) -> Any:
    """A guide that reads bfloat16 features and writes bfloat16 residuals, but computes in float32."""
    own = guide.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        wide = {k: _cast(v, torch.float32) for k, v in kwargs.items()}
        return _cast(own(*_cast(args, torch.float32), **wide), torch.bfloat16)

    guide.forward = forward
    return guide


def _module(unet: Any, guide: Any | None, precision: str) -> nn.Module:
    """The evaluation as one module, with copies of the weights in ``precision``."""
    unet, guide = copy.deepcopy(unet), copy.deepcopy(guide)
    if precision != FLOAT32:
        unet = unet.to(torch.bfloat16)
    if guide is not None and precision == BFLOAT16:
        guide = guide.to(torch.bfloat16)
    if guide is not None and precision == MIXED:
        guide = _in_float32(guide)
    whole = _Plain(unet) if guide is None else Student(unet, guide)
    return whole.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Network:
    """One evaluation of a U-Net (and guide) for any number of images, with float32 inputs and outputs.

    A compiled network takes batches of one size only, so images are split into batches, and the last one is padded.

    Args:
        unet, guide: in float32; copies of both are kept.
        precision: ``float32``, ``bfloat16``, or ``bfloat16, guide in float32``.
        compiled: through ``torch.compile``, which takes a minute at the first evaluation.
    """

    def __init__(self, unet: Any, guide: Any | None, precision: str, compiled: bool, batch: int = BATCH) -> None:
        self.precision, self.batch = precision, batch
        self.module = _module(unet, guide, precision)
        #: why the network runs eager although it should have been compiled
        self.trouble: str | None = None
        self._run: Callable[..., Tensor] = torch.compile(self.module, dynamic=False) if compiled else self.module
        self.compiled = compiled

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        if not self.compiled:
            return self._pass(x, t, text, w)
        out = []
        for i in range(0, len(x), self.batch):
            some = [v[i : i + self.batch] for v in (x, t, text, w)]
            n = len(some[0])
            if n < self.batch:
                some = [torch.cat([v, v[-1:].expand(self.batch - n, *v.shape[1:])]) for v in some]
            out.append(self._pass(*some)[:n])
        return torch.cat(out)

    def _pass(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        dtype = torch.float32 if self.precision == FLOAT32 else torch.bfloat16
        inputs = (x.to(dtype).contiguous(memory_format=torch.channels_last), t, text.to(dtype).contiguous(), w)
        if not self.compiled:
            return self.module(*inputs).float()
        import torch._inductor.config as inductor

        try:
            # frozen weights are constants, which oneDNN packs once; dynamo reads the setting too, so it is global
            with inductor.patch(freezing=True), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._run(*inputs).float()
        except Exception as error:  # no compiler, or unsupported by it: eager gives the same images
            self.compiled, self.trouble = False, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return self.module(*inputs).float()


def settle(
    unet: Any, guide: Any | None, draw: Callable[[Predict], np.ndarray], batch: int = BATCH, compiled: bool = True
) -> tuple[Network, dict[str, Any]]:
    """The fastest network whose images agree with eager float32's, and the record of the choice.

    Args:
        draw: samples a few images (uint8 ``[N, H, W, 3]``) with a network, at the strongest guidance in use.
        compiled: whether networks may be compiled.
    """
    record: dict[str, Any] = {"precision": FLOAT32, "compiled": False, "psnr_db": {}, "trouble": None}
    if next(unet.parameters()).device.type != "cpu" or not multiplies("bfloat16"):
        return Network(unet, guide, FLOAT32, False, batch), record
    exact = draw(Network(unet, guide, FLOAT32, False, batch))
    for precision in (BFLOAT16,) if guide is None else (BFLOAT16, MIXED):
        level = float(fidelity.psnr(draw(Network(unet, guide, precision, False, batch)), exact).mean())
        record["psnr_db"][precision] = round(level, 2)
        if level >= SAME_TO_THE_EYE:
            record["precision"] = precision
            break
    if record["precision"] == FLOAT32 or not compiled:
        return Network(unet, guide, record["precision"], False, batch), record
    network = Network(unet, guide, record["precision"], True, batch)
    level = float(fidelity.psnr(draw(network), exact).mean())
    record["trouble"] = network.trouble
    if network.compiled:
        record["psnr_db"][f"{network.precision}, compiled"] = round(level, 2)
        record["compiled"] = level >= SAME_TO_THE_EYE
        if not record["compiled"]:
            record["trouble"] = "the compiled network's images differ"
            network = Network(unet, guide, record["precision"], False, batch)
    return network, record

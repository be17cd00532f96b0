"""Converted modules → description and safetensors, for backends that run modules and not graphs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.golden_file import Outputs, difference
from ..bundle.store import write_json
from ..graph.weights import WeightMap
from ..models.rebuild import describe
from ..precision.recipes import as_arrays
from ..precision.wide_products import emulated, wide_products

if TYPE_CHECKING:
    from torch import Tensor, nn


#: where parity is measured, if PyTorch finds one
_GPU = "cuda"


def save(module: nn.Module, path: Path) -> WeightMap:
    """Write ``path`` (``unet.json``: what the module is) and its weights beside it (``unet.safetensors``).

    Args:
        module: as ``precision.convert`` left it; its weights are written in the types that they have.

    Returns:
        Where each weight comes from, as for a graph; its name in the file is ``SOURCE.KEY``.

    Raises:
        OSError: if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = path.with_suffix(".safetensors")
    write_json(path, describe(module))
    held = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    try:
        save_file(held, weights)
    except SafetensorError as e:
        raise OSError(str(e)) from e
    weights.chmod(path.stat().st_mode)  # safetensors makes files that only their owner can read
    out = WeightMap()
    for name, tensor in sorted(held.items()):
        source, _, key = name.partition(".")
        cast = {"op": "cast", "to": str(tensor.dtype).removeprefix("torch.")}
        out.weights[name] = {"source": source, "key": key, "transform": [cast]}
    return out


def relative_error(module: nn.Module, inputs: dict[str, Tensor], reference: Outputs) -> float:
    """‖out − reference‖ / ‖reference‖ of a module in its own precision; NaN when either is not finite.

    Measured on the GPU where there is one with enough memory, as that is what serves it, and without TensorFloat-32;
    else on the CPU.  There half precision that the processor does not multiply itself is computed as
    :func:`wide_products` does: PyTorch's emulation is 20 to 150 times slower.

    Args:
        module: stays on the CPU, or comes back to it.
    """
    import torch

    if torch.cuda.is_available():
        try:
            return difference(_on_gpu(module, inputs), reference)
        except torch.OutOfMemoryError:
            pass  # the CPU has more
    with torch.no_grad(), wide_products() if emulated(module) else contextlib.nullcontext():
        return difference(as_arrays(module(**inputs)), reference)


def _on_gpu(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    import torch

    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            module.to(_GPU)
            return as_arrays(module(**{k: v.to(_GPU) for k, v in inputs.items()}))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        module.to("cpu")
        torch.cuda.empty_cache()

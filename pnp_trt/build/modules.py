"""Save converted modules as a description and safetensors, for backends that run modules instead of graphs."""

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


#: device on which parity is measured, if available
_GPU = "cuda"


def save(module: nn.Module, path: Path) -> WeightMap:
    """Write the module's description to ``path`` (``unet.json``) and its weights beside it (``unet.safetensors``).

    Args:
        module: converted by ``precision.convert``; its weights are written in their current types.

    Returns:
        The origin of each weight, as for a graph; weights are named ``SOURCE.KEY`` in the file.

    Raises:
        OSError: if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = path.with_suffix(".safetensors")
    write_json(path, describe(module))
    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    try:
        save_file(tensors, weights)
    except SafetensorError as e:
        raise OSError(str(e)) from e
    weights.chmod(path.stat().st_mode)  # safetensors makes files that only their owner can read
    out = WeightMap()
    for name, tensor in sorted(tensors.items()):
        source, _, key = name.partition(".")
        cast = {"op": "cast", "to": str(tensor.dtype).removeprefix("torch.")}
        out.weights[name] = {"source": source, "key": key, "transform": [cast]}
    return out


def relative_error(module: nn.Module, inputs: dict[str, Tensor], reference: Outputs) -> float:
    """‖out − reference‖ / ‖reference‖ of a module in its own precision; NaN when either is not finite.

    Measured on a GPU with enough memory if there is one, since such a module is served on a GPU, without
    TensorFloat-32; otherwise on the CPU.  A half-precision type that the processor cannot multiply natively is computed
    with :func:`wide_products` there, because PyTorch's emulation is 20 to 150 times slower.

    Args:
        module: on the CPU, where it is afterwards too.
    """
    import torch

    if torch.cuda.is_available():
        try:
            return difference(_on_gpu(module, inputs), reference)
        except torch.OutOfMemoryError:
            pass  # the host has more memory
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

"""Converted modules → description and safetensors, for backends that run modules and not graphs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import processor
from ..bundle.store import write_json
from ..models.rebuild import describe
from ..runtime.verify import difference
from ..precision.recipes import cast
from ..graph.weights import WeightMap

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn


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


def relative_error(module: nn.Module, inputs: dict[str, Tensor], reference: np.ndarray) -> float:
    """‖out − reference‖ / ‖reference‖ of a module on the CPU in its own precision; NaN when either is not finite.

    Half precision that the processor does not multiply itself is computed as :func:`wide_products` does: PyTorch's
    emulation is 20 to 150 times slower.
    """
    import torch

    with torch.no_grad(), wide_products() if emulated(module) else contextlib.nullcontext():
        return difference(module(**inputs).float().numpy(), reference)


def emulated(module: nn.Module) -> bool:
    """Whether a module on the CPU has weights of a type that this processor does not multiply."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    return any(not processor.multiplies(dtype) for dtype in dtypes & {"float16", "bfloat16"})


def wide_products() -> Any:
    """A context in which products of half-precision tensors are computed in float32 and then rounded to their type.

    That is what hardware with half precision does: it multiplies half-precision numbers and adds the products up in
    float32.  Every other operation runs in half precision, where PyTorch rounds each result too.  Under
    ``torch.no_grad``, not ``inference_mode``, which hides the operations that a layer consists of.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    products = {
        aten.convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot,
        aten._scaled_dot_product_flash_attention_for_cpu,
    }  # fmt: skip

    class WideProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            dtype = half_of(args) if func.overloadpacket in products else None
            if dtype is None:
                return func(*args, **(kwargs or {}))
            return cast(func(*cast(args, torch.float32), **cast(kwargs or {}, torch.float32)), dtype)

    return WideProducts()


def half_of(tree: Any) -> torch.dtype | None:
    """The half-precision type among the tensors of a tree; None where there is none."""
    import torch
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16):
            return leaf.dtype
    return None

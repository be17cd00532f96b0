"""Half-precision matrix products computed in float32, for processors that emulate half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import processor
from .recipes import cast

if TYPE_CHECKING:
    import torch
    from torch import nn


def emulated(module: nn.Module) -> bool:
    """Whether a module on the CPU has weights of a type that this processor cannot multiply natively."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    return any(not processor.multiplies(dtype) for dtype in dtypes & {"float16", "bfloat16"})


def wide_products() -> Any:
    """Return a context in which products of half-precision tensors are computed in float32 and rounded back.

    Half-precision hardware does the same: it multiplies half-precision numbers and accumulates in float32.  All other
    operations run in half precision, where PyTorch rounds each result.  Use it under ``torch.no_grad``, not under
    ``inference_mode``, which hides the operations of a layer.
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
    """Return the half-precision type of the first such tensor in a tree; None if there is none."""
    import torch
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16):
            return leaf.dtype
    return None

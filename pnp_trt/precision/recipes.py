"""Precision recipes: which numbers a network computes in, decided before it is exported.

The types are in the graph and nowhere else.  TensorRT 11 and TensorRT-RTX build strongly typed networks only,
and the same graph then means the same on every backend.  A module is converted *before* it is exported, by
PyTorch, and not the graph afterwards: the FP16 graph is then what diffusers runs with ``torch_dtype=float16``, at
half the memory, and no converter has to follow the opset.  What must stay in float32 then stays of itself:
the sinusoids of timestep and scale (both modules compute them in float32 and cast), and the statistics of group and
layer norms (``stash_type`` 1 on nodes that read and write half precision, which keeps their fused kernels).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from ..graph.weights import Derived, WeightMap
    from .int8.record import LayerRange, Record


@dataclass(frozen=True)
class Recipe:
    """One way to compute.  Its fields are part of a bundle's key; what it does is in its methods.

    Attributes:
        name: as the command line spells it.
        dtype: torch's name of the type of weights and activations.
        limit: largest relative error ‖out − reference‖ / ‖reference‖ against float32 PyTorch that a network may
            show on its golden inputs.
        islands: patterns (``fnmatch``) of module names that compute in float32 all the same.
        fallback: networks that are exported in float32 when this recipe gives them values that are not finite or
            too far off; the manifest records it.
    """

    name: str
    dtype: str
    limit: float
    islands: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()

    @property
    def elements(self) -> frozenset[str]:
        """Element types that a backend must run for this recipe, by their names in torch."""
        return frozenset({self.dtype})

    @property
    def needs_record(self) -> bool:
        """Whether it wants a calibration record (``pnp-trt calibrate``)."""
        return False

    def on_backend(self, beside: Recipe, one_scale: bool = False) -> Recipe:
        """This recipe on a backend.

        Args:
            beside: the backend's recipe for what is not quantised.
            one_scale: whether the backend's INT8 weights have one scale each (``Backend.int8_one_scale``).
        """
        return self

    def of_network(self, network: str) -> Recipe:
        """The recipe of one network of a bundle."""
        return self

    def convert(self, module: nn.Module) -> nn.Module:
        """Make ``module`` compute as this recipe says, in place, before it is exported; see :func:`convert`."""
        return convert(module, self)

    def choices(self, record: Record) -> Mapping[str, LayerRange]:
        """The layers with 8-bit inputs and weights, and their ranges, by a calibration record; none by default."""
        return {}

    def quantize(self, graph: Path, weights: WeightMap, record: Record | None) -> Derived | None:
        """Rewrite the exported graph in place; None where the recipe leaves graphs as they are exported.

        Args:
            graph: the ONNX file.
            weights: its weight map.
            record: the calibration record, where ``needs_record``.

        Returns:
            New initialiser → (what it was made of, the steps), as ``WeightMap.derive`` takes it.
        """
        return None


@dataclass(frozen=True)
class Fp32(Recipe):
    """Float32 throughout; TensorFloat-32 is switched off as well."""

    name: str = "fp32"
    dtype: str = "float32"
    limit: float = 1e-4


@dataclass(frozen=True)
class Fp16(Recipe):
    """Float16; the limit is ten times its rounding error of 2⁻¹¹.

    Measured on the bundled U-Net: 8e-4, the same with the time embeddings as islands, so there are none by default.
    Decoders of some autoencoders overflow in float16 (SDXL's does), so the decoder may fall back.
    """

    name: str = "fp16"
    dtype: str = "float16"
    limit: float = 5e-3
    fallback: tuple[str, ...] = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class Bf16(Recipe):
    """Bfloat16: float32's range at a rounding error of 2⁻⁸, and a limit of ten times that; measured: 7e-3."""

    name: str = "bf16"
    dtype: str = "bfloat16"
    limit: float = 4e-2
    fallback: tuple[str, ...] = ("vae_decoder", "vae_encoder")


FP32, FP16, BF16 = Fp32(), Fp16(), Bf16()

#: recipes by name
RECIPES: Registry[Recipe] = Registry(
    "recipes",
    "precision",
    {
        "fp32": "pnp_trt.precision.recipes:FP32",
        "fp16": "pnp_trt.precision.recipes:FP16",
        "bf16": "pnp_trt.precision.recipes:BF16",
        "int8": "pnp_trt.precision.int8.recipes:INT8",
        "int8-weights": "pnp_trt.precision.int8.recipes:INT8_WEIGHTS",
        "fp8": "pnp_trt.precision.fp8:FP8",
    },
)
#: what is built where nothing is asked for; names of bundles leave it out
DEFAULT = FP32.name


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        InputError: listing the known ones.
    """
    return RECIPES.get(name)


def convert(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Make ``module`` compute as ``recipe`` states; its inputs and output stay float32, as the sampler has them.

    The boundary costs one cast of a latent a step, and spares every caller from knowing the recipe.  The module's
    weights are rounded in place: take the reference before.
    """
    import torch

    dtype = getattr(torch, recipe.dtype)
    if dtype == torch.float32:
        return module.to(dtype)
    islands = {
        name: child
        for name, child in module.named_modules()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.islands)
    }
    kept = {part for child in islands.values() for part in child.modules()}
    for part in module.modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if part in kept else dtype)
    for child in islands.values():
        _cast_around(child, torch.float32, dtype)
    _cast_around(module, dtype, torch.float32)
    return module


def _cast_around(module: nn.Module, inside: Any, outside: Any) -> None:
    module.register_forward_pre_hook(lambda _, a, k: (cast(a, inside), cast(k, inside)), with_kwargs=True)
    module.register_forward_hook(lambda _, a, out: cast(out, outside))


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point tensors in ``dtype``, the rest as it is."""
    import torch
    from torch.utils import _pytree as pytree

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return pytree.tree_map(one, tree)


def reference(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The module's output in float32, whatever type its weights are kept in; a tuple where it has several.

    Weights in half precision are widened one layer at a time, so that a large model needs no second copy.
    """
    import torch

    with torch.no_grad(), _widened(module):
        return cast(module(**inputs), torch.float32)


def as_arrays(outputs: Any) -> np.ndarray | tuple[np.ndarray, ...]:
    """A module's output, or its outputs, as float32 of numpy."""
    if isinstance(outputs, tuple):
        return tuple(value.float().cpu().numpy() for value in outputs)
    only: np.ndarray = outputs.float().cpu().numpy()
    return only


@contextmanager
def _widened(module: nn.Module) -> Iterator[None]:
    import torch

    handles = []
    kept: dict[Any, Any] = {}

    def widen(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        for tensor in layer.parameters(recurse=False):
            kept[tensor] = tensor.data
            tensor.data = tensor.data.float()
        return cast((args, kwargs), torch.float32)  # some modules cast to the type that their weights are kept in

    def narrow(layer: nn.Module, *_: Any) -> None:
        for tensor in layer.parameters(recurse=False):
            tensor.data = kept.pop(tensor)

    try:
        for layer in module.modules():
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in layer.parameters(recurse=False)):
                handles.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
                handles.append(layer.register_forward_hook(narrow))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, data in kept.items():
            tensor.data = data

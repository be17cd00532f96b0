"""Precision recipes: the element types in which a network computes, fixed before export.

The graph alone defines the types.  TensorRT 11 and TensorRT-RTX build only strongly typed networks, and a graph has the
same meaning on every backend.  PyTorch converts the module *before* the export, instead of a converter the graph
afterwards.  The FP16 graph is then the one that diffusers runs with ``torch_dtype=float16``, export takes half the
memory, and no converter has to keep up with opsets.  What must stay in float32 does so without further work: the
sinusoids of timestep and scale (both modules compute them in float32 and cast), and the statistics of group and layer
norms (``stash_type`` 1 on nodes that read and write half precision, which keeps their fused kernels).
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
    """A precision recipe.  Its fields are part of a bundle's key; its methods apply it.

    Attributes:
        name: name on the command line.
        dtype: torch's name of the type of weights and activations.
        limit: largest allowed relative error ‖out − reference‖ / ‖reference‖ of a network against float32 PyTorch on
            its golden inputs.
        islands: patterns (``fnmatch``) of names of modules that still compute in float32.
        fallback: networks that are exported in float32 if this recipe gives values that are not finite or outside the
            limit; the manifest records it.
    """

    name: str
    dtype: str
    limit: float
    islands: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()

    @property
    def elements(self) -> frozenset[str]:
        """Element types that a backend must support for this recipe, by their names in torch."""
        return frozenset({self.dtype})

    @property
    def needs_record(self) -> bool:
        """Whether it requires a calibration record (``pnp-trt calibrate``)."""
        return False

    def on_backend(self, beside: Recipe, one_scale: bool = False) -> Recipe:
        """Return this recipe adapted to a backend.

        Args:
            beside: the backend's recipe for everything that is not quantised.
            one_scale: whether the backend's INT8 weights have one scale each (``Backend.int8_one_scale``).
        """
        return self

    def of_network(self, network: str) -> Recipe:
        """Return the recipe of one network of a bundle."""
        return self

    def convert(self, module: nn.Module) -> nn.Module:
        """Convert ``module`` to this recipe in place, before export; see :func:`convert`."""
        return convert(module, self)

    def choices(self, record: Record) -> Mapping[str, LayerRange]:
        """Return the layers with 8-bit inputs and weights and their ranges from a record; none by default."""
        return {}

    def quantize(self, graph: Path, weights: WeightMap, record: Record | None) -> Derived | None:
        """Quantise the exported graph in place, if the recipe does so.

        Args:
            graph: the ONNX file.
            weights: its weight map.
            record: the calibration record, if ``needs_record``.

        Returns:
            New initialiser → (source initialiser, transform steps), as ``WeightMap.derive`` takes it; None for a recipe
            that leaves graphs unchanged.
        """
        return None


@dataclass(frozen=True)
class Fp32(Recipe):
    """Float32 throughout, without TensorFloat-32."""

    name: str = "fp32"
    dtype: str = "float32"
    limit: float = 1e-4


@dataclass(frozen=True)
class Fp16(Recipe):
    """Float16, with a limit of ten times its rounding error of 2⁻¹¹.

    The measured error on the bundled U-Net is 8e-4, and the same with the time embeddings as islands, so there are none
    by default.  The decoders of some autoencoders overflow in float16 (such as SDXL's), so the decoder may fall back.
    """

    name: str = "fp16"
    dtype: str = "float16"
    limit: float = 5e-3
    fallback: tuple[str, ...] = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class Bf16(Recipe):
    """Bfloat16: float32's range, a rounding error of 2⁻⁸, and a limit of ten times that.  Measured error: 7e-3."""

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
#: the default recipe, which the names of bundles omit
DEFAULT = FP32.name


def recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        InputError: if it is unknown; the message lists the known ones.
    """
    return RECIPES.get(name)


def convert(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Convert ``module`` to ``recipe`` in place; its inputs and output stay float32, as in the sampler.

    This costs one cast of the latents per step, and callers do not depend on the recipe.  The weights are rounded in
    place: compute the reference first.
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
    wide = {part for child in islands.values() for part in child.modules()}
    for part in module.modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if part in wide else dtype)
    for child in islands.values():
        _cast_around(child, torch.float32, dtype)
    _cast_around(module, dtype, torch.float32)
    return module


def _cast_around(module: nn.Module, inside: Any, outside: Any) -> None:
    module.register_forward_pre_hook(lambda _, a, k: (cast(a, inside), cast(k, inside)), with_kwargs=True)
    module.register_forward_hook(lambda _, a, out: cast(out, outside))


def cast(tree: Any, dtype: Any) -> Any:
    """Cast the floating-point tensors of a tree to ``dtype``; the rest is unchanged."""
    import torch
    from torch.utils import _pytree as pytree

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return pytree.tree_map(one, tree)


def reference(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Return the module's output computed in float32, whatever the type of its weights; a tuple if it has several.

    Half-precision weights are widened one layer at a time, so that a large model needs no second copy.
    """
    import torch

    with torch.no_grad(), _widened(module):
        return cast(module(**inputs), torch.float32)


def as_arrays(outputs: Any) -> np.ndarray | tuple[np.ndarray, ...]:
    """Convert a module's output or outputs to float32 arrays."""
    if isinstance(outputs, tuple):
        return tuple(value.float().cpu().numpy() for value in outputs)
    only: np.ndarray = outputs.float().cpu().numpy()
    return only


@contextmanager
def _widened(module: nn.Module) -> Iterator[None]:
    import torch

    handles = []
    originals: dict[Any, Any] = {}

    def widen(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        for tensor in layer.parameters(recurse=False):
            originals[tensor] = tensor.data
            tensor.data = tensor.data.float()
        return cast((args, kwargs), torch.float32)  # some modules cast to the type of their weights

    def narrow(layer: nn.Module, *_: Any) -> None:
        for tensor in layer.parameters(recurse=False):
            tensor.data = originals.pop(tensor)

    try:
        for layer in module.modules():
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in layer.parameters(recurse=False)):
                handles.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
                handles.append(layer.register_forward_hook(narrow))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, data in originals.items():
            tensor.data = data

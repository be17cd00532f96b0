"""Inference runtimes behind one interface (``base``); each package imports its runtime lazily."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..errors import InputError
from ..registry import Registry

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from .base import Backend
    from .needs import Needs

#: backend classes by name
BACKENDS: Registry[type[Backend]] = Registry(
    "backends",
    "backend",
    {
        "onnxruntime": "pnp_trt.backends.onnxruntime.backend:OnnxRuntime",
        "tensorrt-rtx": "pnp_trt.backends.tensorrt.backend:TensorRtRtx",
        "tensorrt": "pnp_trt.backends.tensorrt.backend:TensorRt",
        "torch": "pnp_trt.backends.torch.backend:Torch",
        "openvino": "pnp_trt.backends.openvino.backend:OpenVino",
    },
)

#: what built-in backends need of a machine; those of other packages say it in their class
_NEEDS: Registry[Needs] = Registry(
    "backend_needs",
    "backend",
    {
        "onnxruntime": "pnp_trt.backends.onnxruntime:NEEDS",
        "tensorrt-rtx": "pnp_trt.backends.tensorrt:NEEDS_RTX",
        "tensorrt": "pnp_trt.backends.tensorrt:NEEDS",
        "torch": "pnp_trt.backends.torch:NEEDS",
        "openvino": "pnp_trt.backends.openvino:NEEDS",
    },
)


def all_needs() -> dict[str, Needs]:
    """What each registered backend needs, by name; built-in runtimes are not imported for it.

    A backend of another package that cannot be imported is left out with a warning.
    """
    found = {name: _NEEDS.get(name) for name in _NEEDS}
    for name in BACKENDS:
        if name not in found:
            try:
                found[name] = BACKENDS.get(name).needs
            except InputError as e:
                warnings.warn(f"{e}; it is left out", stacklevel=2)
    return found


def of(manifest: Manifest) -> Backend:
    """The backend of a bundle; its recipes are known, and its files are of the kind that the backend loads.

    Raises:
        InputError: if this installation has no such backend or recipe.
        BundleCorrupt: for a file of another kind.
    """
    from ..precision.recipes import RECIPES

    backend = get(manifest.backend)
    for name in (manifest.precision, *(network.precision for network in manifest.networks.values())):
        RECIPES.get(name)
    backend.check_files(manifest)
    return backend


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        InputError: listing the known ones.
    """
    return BACKENDS.get(name)()

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

#: machine requirements of the built-in backends; backends of other packages declare theirs in their class
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
    """Return the requirements of each registered backend, by name, without importing the built-in runtimes.

    A backend of another package that cannot be imported is left out with a warning.
    """
    requirements = {name: _NEEDS.get(name) for name in _NEEDS}
    for name in BACKENDS:
        if name not in requirements:
            try:
                requirements[name] = BACKENDS.get(name).needs
            except InputError as e:
                warnings.warn(f"{e}; it is left out", stacklevel=2)
    return requirements


def of(manifest: Manifest) -> Backend:
    """Return the backend of a bundle, after checking its recipes and the kinds of its files.

    Raises:
        InputError: if this installation lacks the backend or one of the recipes.
        BundleCorrupt: if the backend does not load files of this kind.
    """
    from ..precision.recipes import RECIPES

    backend = get(manifest.backend)
    for name in (manifest.precision, *(network.precision for network in manifest.networks.values())):
        RECIPES.get(name)
    backend.check_files(manifest)
    return backend


def get(name: str) -> Backend:
    """Return the backend of this name.

    Raises:
        InputError: if it is unknown; the message lists the known ones.
    """
    return BACKENDS.get(name)()

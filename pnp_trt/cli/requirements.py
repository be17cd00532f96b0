"""Packages that commands need beyond the base installation."""

from __future__ import annotations

import importlib.util

from ..errors import MissingDependency

_BUILD = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
#: command -> extra -> the extra's modules that the command requires
_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "build": {"build": _BUILD},
    "plug": {"build": _BUILD},
    "verify --layers": {"build": ("onnx_ir", "polygraphy")},
    "calibrate": {"int8": (*_BUILD, "modelopt")},
    "distill": {"train": (*_BUILD, "accelerate")},  # TensorBoard is optional: without it, no logs are written
    "visualize": {"build": _BUILD, "bench": ("matplotlib",)},
    "serve": {"serve": ("fastapi", "uvicorn", "prometheus_client", "python_multipart")},
    "serve --ray": {"serve": ("fastapi", "uvicorn", "prometheus_client", "python_multipart"), "ray": ("ray",)},
    "generate --ray": {"ray": ("ray",)},
    "serve --loras": {"build": _BUILD},
    "bench --html": {"bench": ("jinja2", "matplotlib")},
}


def missing_packages(command: str) -> str | None:
    """Return the missing packages of ``command`` and how to install them, or None if all are installed."""
    lacking = {
        extra: missing
        for extra, modules in _NEEDS[command].items()
        if (missing := [m for m in modules if importlib.util.find_spec(m) is None])
    }
    if not lacking:
        return None
    names = ", ".join(name for missing in lacking.values() for name in missing)
    return f"{names}; install with: pip install 'pnp-trt[{','.join(lacking)}]'"


def require_packages(command: str) -> None:
    """Check that the packages of ``command`` are installed.

    Raises:
        MissingDependency: naming the missing packages and the extra that installs them.
    """
    if missing := missing_packages(command):
        raise MissingDependency(f"pnp-trt {command} needs {missing}")

"""Packages that a command needs beyond the base installation."""

from __future__ import annotations

import importlib.util

from ..errors import MissingDependency

_BUILD = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
#: command -> extra -> the modules of it that the command cannot do without
_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "build": {"build": _BUILD},
    "plug": {"build": _BUILD},
    "verify --layers": {"build": ("onnx_ir", "polygraphy")},
    "calibrate": {"int8": (*_BUILD, "modelopt")},
    "distill": {"train": (*_BUILD, "accelerate")},  # TensorBoard logs are left out where it is not installed
    "visualize": {"build": _BUILD, "bench": ("matplotlib",)},
    "serve": {"serve": ("fastapi", "uvicorn", "prometheus_client", "python_multipart")},
    "serve --ray": {"serve": ("fastapi", "uvicorn", "prometheus_client", "python_multipart"), "ray": ("ray",)},
    "generate --ray": {"ray": ("ray",)},
    "serve --loras": {"build": _BUILD},
    "bench --html": {"bench": ("jinja2", "matplotlib")},
}


def missing_packages(command: str) -> str | None:
    """The packages that ``command`` lacks and how to install them, or None where it lacks none."""
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
        MissingDependency: with the packages and the extra that installs them.
    """
    if missing := missing_packages(command):
        raise MissingDependency(f"pnp-trt {command} needs {missing}")

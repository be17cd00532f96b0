"""Packages that a command needs beyond the base installation."""

from __future__ import annotations

import importlib.util

from ..errors import MissingDependency


def require_packages(command: str) -> None:
    """Raise ``InputError`` with the extra to install where a package that ``command`` imports is missing."""
    wanted = ["torch", "diffusers", "transformers", "onnx", "onnxscript"]
    wanted += ["modelopt"] if command == "calibrate" else []
    if missing := [m for m in wanted if importlib.util.find_spec(m) is None]:
        extra = {"distill": "train", "calibrate": "int8"}.get(command, "build")
        raise MissingDependency(
            f"pnp-trt {command} needs {', '.join(missing)}; install with: pip install 'pnp-trt[{extra}]'"
        )

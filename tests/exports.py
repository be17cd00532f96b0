"""Builds of the test suite export each module once: tracing a U-Net takes half a minute, even a tiny one's.

What is exported is decided by the module alone, so a second build of the same module takes the first one's files.
Tests of the export itself import ``export`` before :func:`share` replaces it, and so always run it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def identity(module: Any, inputs: dict[str, Any], output: str, path: Path, open_axes: Sequence[Any]) -> str:
    """Digest of all that an export depends on: structure, configs, hooks, every tensor, and the arguments."""
    import torch

    sha = hashlib.sha256(repr((type(module), module, output, path.name, list(open_axes))).encode())
    sha.update(repr([(n, x.dtype, tuple(x.shape)) for n, x in inputs.items()]).encode())
    plain = str | int | float | bool | tuple | list | None
    for name, part in module.named_modules():
        config = config_of(part) if hasattr(part, "config") else None
        own = {k: v for k, v in vars(part).items() if isinstance(v, plain)}
        hooks = [hook_of(h) for h in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())]
        sha.update(repr((name, type(part), config, own, hooks)).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def config_of(part: Any) -> Any:
    """A diffusers or transformers config as text."""
    config = part.config
    return config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(dict(config), default=str)


def hook_of(hook: Any) -> list[str]:
    """A hook's code and what it closes over."""
    cells = [repr(c.cell_contents) for c in getattr(hook, "__closure__", None) or ()]
    return [getattr(hook, "__qualname__", repr(hook)), *cells]


def share(once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    """Let builds in this process take exports from ``once``, which fills a folder for all workers."""
    from pnp_trt.build import onnx_export

    real = onnx_export.export
    if hasattr(real, "shared"):
        return

    def export(
        module: Any, inputs: dict[str, Any], output: str, path: Path, open_axes: Sequence[Any] = ()
    ) -> Any:  # fmt: skip
        def fill(folder: Path) -> None:
            folder.mkdir(parents=True)
            weights = real(module, inputs, output, folder / path.name, open_axes)
            (folder / "weights.pickle").write_bytes(pickle.dumps(weights))

        folder = once(f"exports/{identity(module, inputs, output, path, open_axes)}", fill)
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.name != "weights.pickle":
                shutil.copy(file, path.parent)
        return pickle.loads((folder / "weights.pickle").read_bytes())

    export.shared = True  # type: ignore[attr-defined]
    onnx_export.export = export

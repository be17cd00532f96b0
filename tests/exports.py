"""Share traces between builds of the test suite: tracing even a tiny U-Net takes 15 seconds.

A graph depends only on the architecture (``tests/graph/test_weights.py``), so a second build of another module of the
same architecture reuses the first one's trace, and its own weights are written into it.
Tests of this property run under :func:`unshared`, and so always trace.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def identity(module: Any, inputs: dict[str, Any], outputs: Sequence[str], open_axes: Sequence[Any] = ()) -> str:
    """Digest of everything that a graph depends on: structure, configs, hooks, buffers, weight types and arguments."""
    import torch

    # only inputs of four dimensions have open axes
    axes = list(open_axes) if any(x.ndim == 4 for x in inputs.values()) else []
    sha = hashlib.sha256(repr((type(module), module, list(outputs), axes)).encode())
    sha.update(repr([(n, x.dtype, tuple(x.shape)) for n, x in inputs.items()]).encode())
    plain = str | int | float | bool | tuple | list | None
    for name, part in module.named_modules():
        config = config_of(part) if hasattr(part, "config") else None
        own = {k: v for k, v in vars(part).items() if isinstance(v, plain)}
        hooks = [hook_of(h) for h in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())]
        sha.update(repr((name, type(part), config, own, hooks)).encode())
    for name, tensor in module.named_parameters():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for name, tensor in module.named_buffers():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def config_of(part: Any) -> str:
    """A diffusers or transformers config as text, without a guide's ``sampling_steps``."""
    config = part.config
    if hasattr(config, "to_json_string"):
        return config.to_json_string()
    return json.dumps({k: v for k, v in config.items() if k != "sampling_steps"}, default=str)


def hook_of(hook: Any) -> list[Any]:
    """A hook's name and closure; functions in the closure are described likewise, because their repr has an address."""
    contents = [c.cell_contents for c in getattr(hook, "__closure__", None) or ()]
    cells = [hook_of(value) if inspect.isfunction(value) else repr(value) for value in contents]
    return [getattr(hook, "__qualname__", repr(hook)), *cells]


def share(once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    """Make builds in this process reuse traces through ``once``, which fills a folder for all workers."""
    import onnx
    import onnx_ir as ir
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from pnp_trt.build import onnx_export

    real = onnx_export.trace
    if hasattr(real, "shared"):
        return
    # the exporter reads all operators' signatures again for every trace, although nothing changes them
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

    def trace(module: Any, inputs: dict[str, Any], outputs: list[str], open_axes: Sequence[Any] = ()) -> Any:
        def fill(folder: Path) -> None:
            folder.mkdir(parents=True)
            model, hidden = real(module, inputs, outputs, open_axes)
            (folder / "graph.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())
            (folder / "hidden.json").write_text(json.dumps(hidden))

        folder = once(f"traces/{identity(module, inputs, outputs, open_axes)}", fill)
        model = ir.serde.deserialize_model(onnx.ModelProto.FromString((folder / "graph.onnx").read_bytes()))
        return model, json.loads((folder / "hidden.json").read_text())

    trace.shared = real  # type: ignore[attr-defined]
    onnx_export.trace = trace


@contextlib.contextmanager
def unshared() -> Iterator[None]:
    """Make every export trace its own module."""
    from pnp_trt.build import onnx_export

    previous = onnx_export.trace
    onnx_export.trace = getattr(previous, "shared", previous)
    try:
        yield
    finally:
        onnx_export.trace = previous

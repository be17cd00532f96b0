"""In-memory rewrite of a bundle's graph for ONNX Runtime's CUDA provider.

The build writes group norms as instance normalisations (``graph/lower.py``), for which the CPU provider has a fast
kernel.  The CUDA provider has a kernel only for version 6, but opset 22 revised the operator
(``InstanceNormalization-22``): every group norm of a step would run on the CPU, with copies in both directions.  Layer
normalisation over the same axes is the same arithmetic, and its CUDA kernels (``LayerNormalization-17``) accumulate in
float32 for float16 too.

The file and the weights beside it are unchanged.  The package onnx is not required for running a bundle, so the
protocol buffers are rewritten directly, with the field numbers of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...io.protobuf import encode, fields, message, split, text

#: opset in which InstanceNormalization was revised
_REVISED = 22
#: TensorProto.DataType → numpy's name, for the types in which instance normalisations are rewritten
_FLOATS = {1: "float32", 10: "float16"}
_HALF = 10


@dataclass(frozen=True)
class CudaGraph:
    """A graph for the CUDA provider.

    Attributes:
        data: the bytes of an ONNX model, which refers to the same weight files.
        half: whether it has float16 weights.
    """

    data: bytes
    half: bool


@dataclass
class _Tensor:
    """An initialiser: its element type, and its bytes if they are in the graph itself."""

    name: str = ""
    dtype: int = 0
    raw: memoryview | None = None

    def is_all(self, number: float) -> bool:
        """Whether every element is ``number``; False if the elements cannot be read here."""
        if self.raw is None or self.dtype not in _FLOATS:
            return False
        return bool((np.frombuffer(self.raw, _FLOATS[self.dtype]) == number).all())


def for_cuda(data: bytes) -> CudaGraph:
    """Rewrite instance normalisations with scale 1 and offset 0 as layer normalisations.

    ``InstanceNormalization(x, 1, 0)`` of ``x [B, G, …]`` becomes ``LayerNormalization(x, 1, axis=2)``.  Its scale has
    the shape ``x.shape[2:]``; the graph derives it from ``x``, and ONNX Runtime folds it into a constant if the sizes
    are fixed.  Other graphs and nodes are unchanged.

    Raises:
        ValueError: if the bytes are not an ONNX model.
    """
    model = list(split(memoryview(data)))
    initializers: dict[str, _Tensor] = {}
    for number, value, _ in model:
        if number == 7 and value is not None:
            for part, content in fields(message(value)):
                if part == 5:
                    tensor = _tensor(message(content))
                    initializers[tensor.name] = tensor
    half = any(t.dtype == _HALF for t in initializers.values())
    opset = max((_opset(message(value)) for number, value, _ in model if number == 8 and value is not None), default=0)
    if opset < _REVISED:
        return CudaGraph(data, half)
    parts = (
        encode(7, b"".join(_rewritten(message(value), initializers))) if number == 7 and value is not None else whole
        for number, value, whole in model
    )
    return CudaGraph(b"".join(parts), half)


def _rewritten(graph: memoryview, initializers: dict[str, _Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the fields of a graph, with its instance normalisations rewritten."""
    for number, value, whole in split(graph):
        nodes = _layer_norm(message(value), initializers) if number == 1 and value is not None else None
        if nodes is None:
            yield whole
        else:
            yield from (encode(1, node) for node in nodes)


def _layer_norm(node: memoryview, initializers: dict[str, _Tensor]) -> list[bytes] | None:
    """Return the nodes that replace an instance normalisation; None for any other node."""
    inputs: list[str] = []
    outputs: list[str] = []
    attributes: list[bytes] = []
    names: dict[int, str] = {}
    for number, value, whole in split(node):
        if value is None:
            continue
        if number == 1:
            inputs.append(text(value))
        elif number == 2:
            outputs.append(text(value))
        elif number == 5:  # epsilon, with the same name and default in both operators
            attributes.append(bytes(whole))
        elif number in (3, 4, 7):  # name, op_type, domain
            names[number] = text(value)
    if names.get(4) != "InstanceNormalization" or names.get(7, "") not in ("", "ai.onnx") or len(inputs) != 3:
        return None
    x, scale, offset = inputs
    one, zero = initializers.get(scale), initializers.get(offset)
    if one is None or zero is None or not one.is_all(1) or not zero.is_all(0):
        return None
    shape, ones = f"{outputs[0]}.shape", f"{outputs[0]}.ones"
    element = encode(1, 1) + encode(2, one.dtype) + encode(9, np.ones(1, _FLOATS[one.dtype]).tobytes())
    return [
        _node("Shape", [x], shape, _integer("start", 2)),
        _node("ConstantOfShape", [shape], ones, encode(5, encode(1, "value") + encode(5, element) + encode(20, 4))),
        _node("LayerNormalization", [x, ones], outputs[0], *attributes, _integer("axis", 2), name=names.get(3, "")),
    ]


def _node(kind: str, inputs: list[str], output: str, *attributes: bytes, name: str = "") -> bytes:
    """Encode a NodeProto."""
    ends = [*(encode(1, i) for i in inputs), encode(2, output)]
    return b"".join([*ends, encode(3, name or f"{output}.node"), encode(4, kind), *attributes])


def _integer(name: str, value: int) -> bytes:
    """Encode the field of a node that holds an attribute of type INT."""
    return encode(5, encode(1, name) + encode(3, value) + encode(20, 2))


def _opset(data: memoryview) -> int:
    """Return the version of an OperatorSetIdProto of ONNX's own domain; 0 for any other domain."""
    values: dict[int, Any] = dict(fields(data))
    return int(values.get(2, 0)) if text(values.get(1, memoryview(b""))) in ("", "ai.onnx") else 0


def _tensor(data: memoryview) -> _Tensor:
    """Parse the fields of a TensorProto that are needed here."""
    out = _Tensor()
    for number, value in fields(data):
        if number == 2 and isinstance(value, int):
            out.dtype = value
        elif number == 8:
            out.name = text(value)
        elif number == 9:
            out.raw = message(value)
    return out

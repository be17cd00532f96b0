"""Inspect an ONNX file without running it: tensors, operators, and the files of its external weights.

ONNX Runtime opens any file that a graph names and runs any operator in it, so both are checked first.  Only the
relevant parts of the protocol buffers are read; field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BundleCorrupt
from ..io.protobuf import fields, message, text
from ..io.text import printable
from .manifest import Manifest, Tensor

#: operator domains that the runtimes implement; any other needs an additional library
DOMAINS = ("", "ai.onnx", "com.microsoft")
#: element types of a graph's inputs and outputs
DTYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16"}


@dataclass
class Graph:
    """The names in an ONNX file.

    Attributes:
        inputs, outputs: element type and shape by name; a dynamic dimension is its name, which may be empty.
        locations: names of the files with external weights.
        operators: (domain, type) of every node.
        nested: whether a node contains a subgraph (loops and branches), or the file contains functions.
        initializers: names of the weights; old files also list them as inputs.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    locations: set[str] = field(default_factory=set)
    operators: set[tuple[str, str]] = field(default_factory=set)
    nested: bool = False
    initializers: set[str] = field(default_factory=set)


def read_graph(data: bytes) -> Graph:
    """Read the names in an ONNX file.

    Raises:
        ValueError: if the bytes are not an ONNX model.
    """
    out = Graph()
    has_graph = False
    for number, value in fields(memoryview(data)):
        if number == 7:  # ModelProto.graph; a second one is merged into the first
            has_graph = True
            _graph(message(value), out)
        elif number in (20, 25):  # training_info, functions
            out.nested = True
    if not has_graph:
        raise ValueError("it contains no graph")
    out.inputs = {name: tensor for name, tensor in out.inputs.items() if name not in out.initializers}
    return out


def check_graph(folder: Path, manifest: Manifest, network: str) -> None:
    """Refuse a network's graph that reads other files, has other tensors or uses unsupported operators.

    Raises:
        InputError: naming the file, and the difference from the manifest.
    """
    record = manifest.networks[network]
    where = f"engine '{manifest.name}': {record.graph}"
    advice = "use a bundle that pnp-trt build wrote"
    try:
        graph = read_graph((folder / record.graph).read_bytes())
    except (ValueError, OSError) as e:
        raise BundleCorrupt(f"{where} is not a readable ONNX graph ({printable(e, limit=200)}); {advice}") from None
    for location in sorted(graph.locations):
        file = posixpath.join(posixpath.dirname(record.graph), location)
        if file != record.data or file not in manifest.files:
            shown = printable(location, limit=200)
            raise BundleCorrupt(f"{where} reads its weights from '{shown}', which the manifest does not list; {advice}")
    if graph.nested:
        raise BundleCorrupt(
            f"{where} contains loops, branches or functions, which no network of this program has; {advice}"
        )
    if custom := sorted(op for op in graph.operators if op[0] not in DOMAINS):
        shown = printable(f"{custom[0][0]}.{custom[0][1]}", limit=200)
        raise BundleCorrupt(f"{where} has the custom operator {shown}, which no runtime here implements; {advice}")
    for side, tensors, expected in (
        ("inputs", graph.inputs, record.inputs), ("outputs", graph.outputs, record.outputs),
    ):  # fmt: skip
        if not _same(tensors, expected):
            raise BundleCorrupt(
                f"{where} has the {side} {_listed(tensors)}, its manifest states {_listed(expected)}; {advice}"
            )


def _same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether names, types and fixed dimensions are equal; a dynamic dimension matches any."""
    if tensors.keys() != expected.keys():
        return False
    for name, (dtype, shape) in tensors.items():
        kind, dimensions = expected[name]
        if dtype != kind or len(shape) != len(dimensions):
            return False
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(shape, dimensions, strict=True)):
            return False
    return True


def _listed(tensors: Mapping[str, Tensor]) -> str:
    """A short description of tensors."""
    words = (f"{name} {dtype} {'x'.join(map(str, shape))}" for name, (dtype, shape) in tensors.items())
    return printable(", ".join(words) or "none", limit=300)


def _graph(data: memoryview, out: Graph) -> None:
    for number, value in fields(data):
        if number == 1:
            _node(message(value), out)
        elif number == 5:
            out.initializers.add(_tensor(message(value), out))
        elif number == 15:  # SparseTensorProto: values and indices
            for part, tensor in fields(message(value)):
                if part in (1, 2):
                    _tensor(message(tensor), out)
        elif number in (11, 12):
            name, described = _value_info(message(value))
            (out.inputs if number == 11 else out.outputs)[name] = described


def _node(data: memoryview, out: Graph) -> None:
    domain = kind = ""
    for number, value in fields(data):
        if number == 4:
            kind = text(value)
        elif number == 7:
            domain = text(value)
        elif number == 5:
            for part, content in fields(message(value)):
                if part in (5, 10):  # t, tensors
                    _tensor(message(content), out)
                elif part in (6, 11, 22, 23):  # g, graphs, sparse_tensor, sparse_tensors
                    out.nested = True
    out.operators.add((domain, kind))


def _tensor(data: memoryview, out: Graph) -> str:
    """Record the external file of a tensor; return the tensor's name."""
    name = ""
    for number, value in fields(data):
        if number == 8:
            name = text(value)
        elif number == 13:  # external_data: a key and its value
            entry = {part: text(content) for part, content in fields(message(value)) if part in (1, 2)}
            if entry.get(1) == "location":
                out.locations.add(entry.get(2, ""))
    return name


def _value_info(data: memoryview) -> tuple[str, Tensor]:
    name, dtype = "", "no tensor"
    shape: list[int | str] = []
    for number, value in fields(data):
        if number == 1:
            name = text(value)
        elif number == 2:
            for kind, content in fields(message(value)):
                if kind == 1:  # tensor_type
                    dtype, shape = _tensor_type(message(content))
    return name, (dtype, tuple(shape))


def _tensor_type(data: memoryview) -> tuple[str, list[int | str]]:
    dtype = "no type"
    shape: list[int | str] = []
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            dtype = DTYPES.get(value, f"type {value}")
        elif number == 2:
            shape += [_dimension(message(d)) for part, d in fields(message(value)) if part == 1]
    return dtype, shape


def _dimension(data: memoryview) -> int | str:
    out: int | str = ""
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            out = value
        elif number == 2:
            out = text(value)
    return out

"""Read and check a bundle's ``weights.json``, the origin of each initialiser of its graphs; see ``graph.weights``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .document import Value, read_json

_LIMIT, _MEMBERS = 64 << 20, 200_000
_TYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8")


def read_weights(path: Path, networks: Iterable[str], advice: str) -> dict[str, Any]:
    """Read ``{"weights": …, "constants": …}`` by network, and check every entry.

    Args:
        networks: the networks that the file must have.
        advice: what to do about a refused file; the end of the error message.

    Raises:
        InputError: naming the file, the key and the value that is out of bounds.
    """
    document = Value(read_json(path, advice, limit=_LIMIT, members=_MEMBERS), "", str(path), advice)
    m = document.members(("schema", "networks"))
    m["schema"].integer(1, 1)
    entries = m["networks"].members(networks, m["networks"].entries(50))
    for network in entries.values():
        maps = network.members(("weights", "constants"))
        for weight in maps["weights"].entries(_MEMBERS, longest_key=4096).values():
            _check_weight(weight)
        for constant in maps["constants"].items(0, _MEMBERS):
            constant.text()
    return {name: entry.raw for name, entry in entries.items()}


def _check_weight(weight: Value) -> None:
    m = weight.members(("source", "key", "transform"))
    m["source"].text(longest=100)
    m["key"].text(shortest=1)
    for step in m["transform"].items(0, 20):
        _check_step(step)


def _check_step(step: Value) -> None:
    operation = step.member("op").text(
        known=("cast", "transpose", "reshape", "shift", "quantize", "quantization_scale", "float8", "float8_scale")
    )
    if operation in ("cast", "quantization_scale", "float8_scale"):
        step.member("to").text(known=_TYPES)
    # a weight with one scale has no axis
    if operation == "shift" or (operation in ("quantize", "quantization_scale") and "axis" in step.entries(10)):
        step.member("axis").integer(-8, 7)
    if operation == "transpose":
        axes = [v.integer(0, 7) for v in step.member("perm").items(1, 8)]
        if sorted(axes) != list(range(len(axes))):
            raise step.member("perm").refuse("must name every axis once")
    if operation == "reshape":
        for size in step.member("shape").items(0, 8):
            size.integer(-1, 1 << 31)
    if operation == "shift":
        for exponent in step.member("exponents").items(1, 100_000):
            exponent.integer(-64, 64)

"""Read, check and write a bundle's ``golden.npz``: inputs and PyTorch's outputs of every network."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleCorrupt
from ..io.text import printable
from .manifest import NetworkRecord, Tensor

#: float32 outputs of one network: an array, or a tuple of them if the network has several
Outputs = np.ndarray | tuple[np.ndarray, ...]
#: {network: (inputs by name, PyTorch's outputs)}; ``network@HEIGHTxWIDTH`` for sizes other than the default
Golden = dict[str, tuple[dict[str, np.ndarray], Outputs]]
_MOST_ROWS = 64
_ADVICE = "build the bundle again, or use one that pnp-trt build wrote"


def read_golden(path: Path, networks: Mapping[str, NetworkRecord]) -> Golden:
    """Read and check the golden inputs and outputs of every network.

    Raises:
        InputError: if the file is not an uncompressed .npz of plain arrays, names, shapes or types differ from the
            networks', or a value is not finite.
    """
    golden = load_golden(path)
    cases = {case: case.partition("@")[0] for case in golden}
    if set(cases.values()) != set(networks):
        shown = printable(", ".join(cases) or "none", limit=200)
        raise BundleCorrupt(
            f"{path} has golden inputs of {shown}, but the bundle's networks are {', '.join(networks)}; {_ADVICE}"
        )
    for case, (inputs, reference) in golden.items():
        record = networks[cases[case]]
        if inputs.keys() != record.inputs.keys():
            shown = printable(", ".join(inputs) or "none", limit=200)
            raise BundleCorrupt(
                f"{path}: {_name(case)} has the inputs {shown}, not {', '.join(record.inputs)}; {_ADVICE}"
            )
        outputs = as_tuple(reference)
        if len(outputs) != len(record.outputs):
            raise BundleCorrupt(
                f"{path}: {_name(case)} has {len(outputs)} outputs, not {len(record.outputs)}; {_ADVICE}"
            )
        rows = len(outputs[0]) if outputs[0].ndim else 0
        for name, array in inputs.items():
            _check(path, f"{case}/{name}", array, record.inputs[name], rows)
        for number, (array, tensor) in enumerate(zip(outputs, record.outputs.values(), strict=True), 1):
            _check(path, f"{case}/{OUTPUT * number}", array, tensor, rows)
    return golden


#: name of a network's first output in the file, after ``network/``; the second is named ``==``, and so on
OUTPUT = "="


def as_tuple(outputs: Outputs) -> tuple[np.ndarray, ...]:
    """The outputs of a network as a tuple, also if there is only one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def save_golden(path: Path, golden: Golden) -> None:
    """Write inputs and reference outputs, so that a machine without PyTorch can check its engine."""
    arrays: dict[str, Any] = {}
    for network, (inputs, reference) in golden.items():
        arrays |= {f"{network}/{name}": value for name, value in inputs.items()}
        arrays |= {f"{network}/{OUTPUT * i}": value for i, value in enumerate(as_tuple(reference), 1)}
    with path.open("wb") as f:
        np.savez(f, **arrays)


def load_golden(path: Path) -> Golden:
    """Load the arrays of a golden file; nothing is unpickled or decompressed.

    Raises:
        InputError: if it is not an uncompressed .npz of plain arrays.
    """
    out: Golden = {}
    try:
        with zipfile.ZipFile(path) as packed:
            if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in packed.infolist()):
                raise ValueError("it is compressed")
        with np.load(path, allow_pickle=False) as arrays:
            for network in dict.fromkeys(key.partition("/")[0] for key in arrays.files):
                names = [k.partition("/")[2] for k in arrays.files if k.startswith(f"{network}/")]
                last = [arrays[f"{network}/{OUTPUT}"]]
                while (more := f"{OUTPUT * (len(last) + 1)}") in names:
                    last.append(arrays[f"{network}/{more}"])
                inputs = {n: arrays[f"{network}/{n}"] for n in names if n.strip(OUTPUT)}
                out[network] = inputs, last[0] if len(last) == 1 else tuple(last)
    except FileNotFoundError:
        raise BundleCorrupt(f"{path} is missing; {_ADVICE}") from None
    except KeyError as e:
        raise BundleCorrupt(f"{path} lacks {printable(e.args[0], limit=100)}; {_ADVICE}") from None
    except Exception as e:  # numpy and zipfile raise many types on damaged files
        why = "it contains Python objects" if "pickle" in str(e) else printable(e, limit=200)
        raise BundleCorrupt(f"{path} is not readable as golden inputs ({why}); {_ADVICE}") from None
    return out


def _check(path: Path, name: str, array: np.ndarray, tensor: Tensor, rows: int) -> None:
    dtype, shape = tensor
    fits = array.ndim == len(shape) and all(
        isinstance(d, str) or n == d for n, d in zip(array.shape[1:], shape[1:], strict=True)
    )
    if not fits or not 1 <= len(array) == rows <= _MOST_ROWS or array.dtype.kind != ("i" if "int" in dtype else "f"):
        expected = "x".join(map(str, (f"1-{_MOST_ROWS} rows", *shape[1:])))
        raise BundleCorrupt(
            f"{path}: {_name(name)} is {array.dtype} of shape {list(array.shape)}, not {dtype} of {expected}; {_ADVICE}"
        )
    if not np.isfinite(array).all():
        raise BundleCorrupt(f"{path}: {_name(name)} has values that are not finite; {_ADVICE}")


def _name(text: str) -> str:
    return printable(text, limit=100)


def difference(out: Outputs, reference: Outputs) -> float:
    """‖out − reference‖ / ‖reference‖; NaN if the shapes differ or either is not finite.

    For several outputs, the largest of their differences.  0 if both are all zeros, as is the condition that
    an untrained guide computes from w.
    """
    if isinstance(out, tuple) or isinstance(reference, tuple):
        pairs = zip(as_tuple(out), as_tuple(reference), strict=True)
        return float(np.max([difference(a, b) for a, b in pairs]))  # NaN if any is
    if out.shape != reference.shape:
        return float("nan")
    if not (out.any() or reference.any()):
        return 0.0
    return float(np.linalg.norm(out.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))

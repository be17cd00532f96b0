"""Verification of a bundle's engines: outputs for its golden inputs, compared with PyTorch's outputs at build time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .. import backends
from ..backends.base import Backend, LoadOptions
from ..bundle.golden_file import Golden, Outputs, as_tuple, difference, load_golden, read_golden, save_golden
from ..bundle.manifest import GOLDEN as FILE
from ..bundle.manifest import NetworkRecord
from ..bundle.profiles import size_of
from ..bundle.store import Bundle
from ..errors import PnpError
from ..precision.recipes import FP16
from ..sampling.network import Network

__all__ = ["FILE", "Golden", "compare", "difference", "gate", "load_golden", "save_golden", "verify"]


def compare(
    backend: Backend,
    folder: Path,
    networks: Mapping[str, NetworkRecord],
    golden: Golden,
    options: LoadOptions | None = None,
) -> dict[str, float]:
    """Relative error of each network loaded from ``folder``, by name.

    Rows are computed one by one; a row is repeated if no profile of the network supports batch size 1.
    """
    errors = {}
    loaded: dict[str, Network] = {}
    for name, (inputs, reference) in golden.items():
        key = name.partition("@")[0]
        if key not in loaded:  # one at a time: engines are large
            loaded = {key: backend.load(folder / networks[key].file, networks[key], options or LoadOptions())}
        network = loaded[key]
        batch = _smallest_batch(networks[key], inputs)
        rows = [
            _first_row(network, {k: v[i : i + 1].repeat(batch, axis=0) for k, v in inputs.items()}, reference)
            for i in range(len(as_tuple(reference)[0]))
        ]
        outputs = tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))
        errors[name] = difference(outputs, reference)
    return errors


def _first_row(network: Network, inputs: dict[str, np.ndarray], reference: Outputs) -> tuple[np.ndarray, ...]:
    """The first row of every output that has a reference."""
    if isinstance(reference, tuple):
        return tuple(value[:1] for value in network.outputs(**inputs))
    return (network(**inputs)[:1],)


def _smallest_batch(entry: NetworkRecord, inputs: dict[str, np.ndarray]) -> int:
    """The smallest batch size that a network supports at the inputs' size."""
    size = size_of(inputs)
    return min((p.minimum for p in entry.profiles if size is None or p.holds_size(size)), default=1)


def gate(errors: Mapping[str, float], networks: Mapping[str, NetworkRecord], name: str) -> None:
    """Raise ``PnpError`` for the first network whose error exceeds its recipe's limit."""
    for network, error in errors.items():
        entry = networks[network.partition("@")[0]]
        limit = entry.parity.limit
        if entry.compiled.notes.get("tensor_float32") is True:  # TF32 has float16's ten bits of mantissa
            limit = max(limit, FP16.limit)
        if not error <= limit:  # also refuses NaN
            raise PnpError(
                f"engine '{name}': the {network} differs from PyTorch by {error:.2e} (relative), more than the "
                f"{limit:.0e} that {entry.precision} allows; do not serve it, and report it"
            )


def verify(bundle: Bundle, options: LoadOptions | None = None) -> dict[str, float]:
    """Relative errors of a bundle's engines on this machine.

    Raises:
        InputError: if the bundle is not for this machine.
    """
    backend = backends.of(bundle.manifest)
    backend.check(bundle.manifest)
    networks = bundle.manifest.networks
    return compare(backend, bundle.folder, networks, read_golden(bundle.folder / FILE, networks), options)

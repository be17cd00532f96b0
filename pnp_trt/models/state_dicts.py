"""Comparison of a checkpoint's keys and shapes with a network's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError


def check_fits(expected: Mapping[str, Any], weights: Mapping[str, Any], name: str, what: str) -> None:
    """Check that a checkpoint's weights fit a network; ``expected`` and ``weights`` as in ``differences``.

    Raises:
        InputError: if they do not; the message lists the differences.
    """
    if (difference := differences(expected, weights)) is not None:
        raise InputError(
            f"{name} is not a fine-tune of {what}: {difference}; use a checkpoint of the same architecture"
        )


def differences(expected: Mapping[str, Any], weights: Mapping[str, Any]) -> str | None:
    """Describe the differences between the weights of two networks; None if names and shapes are equal.

    Args:
        expected: weights of the engine's network, by key.
        weights: weights of the checkpoint, by key.
    """
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [k for k in expected if k in weights and expected[k].shape != weights[k].shape]
    parts = []
    if shapes:
        key = shapes[0]
        more = f", and {len(shapes) - 1} more differ in shape" if len(shapes) > 1 else ""
        parts.append(f"{key} has shape {list(weights[key].shape)}, not {list(expected[key].shape)}{more}")
    if missing:
        parts.append(f"{counted(missing)} missing")
    if extra:
        parts.append(f"{counted(extra)} left over")
    return " and ".join(parts) or None


def counted(keys: Iterable[str]) -> str:
    """Number and names of weights: ``2 weights (conv_in.bias, conv_in.weight)``; at most four names."""
    names = list(keys)
    shown = f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
    return f"{len(names)} weight{'' if len(names) == 1 else 's'} ({shown})"

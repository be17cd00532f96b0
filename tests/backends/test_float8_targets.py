"""FP8 engines are compiled only for GPUs that have FP8."""

from __future__ import annotations

import pytest

from pnp_trt import backends
from pnp_trt.backends.base import CompileOptions
from pnp_trt.errors import InputError


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_86", None])
def test_older_targets_are_refused(target: str | None) -> None:
    backend = backends.get("tensorrt-rtx")
    shown = target or "portable"
    with pytest.raises(InputError, match=f"target {shown} has no FP8, which needs sm_89 or newer"):
        backend.resolve_target(target, "fp8", CompileOptions())
    assert backend.resolve_target(target, "fp16", CompileOptions()) == shown


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
def test_newer_targets_are_accepted(target: str) -> None:
    assert backends.get("tensorrt-rtx").resolve_target(target, "fp8", CompileOptions()) == target

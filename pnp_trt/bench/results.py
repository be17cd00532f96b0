"""The results document: what was measured, on what, by which command; written whole or not at all, read with care.

The shape is published as the JSON Schema `pnp_trt/bench/schema.json`. Tables, pages and pictures are drawn from this
document and from nothing else.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pnp_trt.artifacts import write_text
from pnp_trt.errors import InputError, PnpError

SCHEMA = "pnp-trt/bench/1"
SCHEMA_FILE = Path(__file__).with_name("schema.json")
#: Packages whose versions are recorded where they are installed; looked up, never imported.
PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "tensorrt",
    "tensorrt-rtx",
)
_REQUIRED = {
    "schema": str,
    "provenance": dict,
    "cost": list,
    "methods_cost": list,
    "latency": list,
    "fidelity": list,
    "task_quality_evaluated": bool,
}
_REQUIRED_IN_ROWS = {
    "cost": ("network", "parameters", "macs", "macs_without_attention"),
    "methods_cost": ("method", "macs_per_step", "macs_per_picture", "steps"),
    "latency": ("engine", "method", "batch", "steps", "p50_ms", "ratio_to_cfg"),
    "fidelity": (),
}


def document(
    command: str | Sequence[str],
    *,
    cost: Sequence[Mapping[str, Any]] = (),
    methods_cost: Sequence[Mapping[str, Any]] = (),
    latency: Sequence[Any] = (),
    fidelity: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    task_quality_evaluated: bool | None = None,
) -> dict[str, Any]:
    """Put measurements and their provenance into one document.

    command: the command line that ran (a string, or the arguments).  cost: rows of `cost.cost_rows`.
    methods_cost: rows of `cost.method_rows`.  latency: `LatencyRow`s or their dicts.  fidelity: rows of the fidelity
    measurement.  task_quality_evaluated: whether they say how good the pictures are (KID, alignment), not only how
    close to the teacher's; None means that there are any.  pictures: what the picture grid shows (prompts,
    seeds, steps, guidance), for the reader.  settings: anything else that the run was asked for.  device: the
    accelerator's name where one was used.
    """
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance(command, device=device),
        "settings": dict(settings or {}),
        "cost": [dict(row) for row in cost],
        "methods_cost": [dict(row) for row in methods_cost],
        "latency": [row.as_dict() if hasattr(row, "as_dict") else dict(row) for row in latency],
        "fidelity": [dict(row) for row in fidelity],
        "task_quality_evaluated": bool(fidelity) if task_quality_evaluated is None else task_quality_evaluated,
    }
    if pictures is not None:
        result["pictures"] = dict(pictures)
    return result


def provenance(command: str | Sequence[str], *, device: str | None = None) -> dict[str, Any]:
    """Who measured: versions, processor, cores, platform, UTC time, commit (None outside a checkout), command."""
    commit, dirty = _commit()
    return {
        "command": command if isinstance(command, str) else shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": dirty,
        "package": _version("pnp-trt") or "unknown",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": device,
        "platform": platform.platform(),
    }


def write(doc: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `doc` as JSON to `path`, whole or not at all, and return the path. Folders are made where missing."""
    target = Path(path)
    try:
        text = json.dumps(doc, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise PnpError(f"The results cannot be written to {target}: {error}; nothing was written.") from error
    write_text(text, target)
    return target


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results document; InputError with the reason for a file that is missing, cut short or of another kind."""
    source = Path(path)
    try:
        doc: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); give a results file that exists.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not a results file: it is not text; give one of pnp-trt bench.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source} is not complete JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "it may have been cut short: run the benchmark again."
        ) from error
    _validate(doc, source)
    return doc


def _validate(doc: Any, source: Path) -> None:
    """The checks that need no JSON Schema library: enough that every table can be drawn."""
    if not isinstance(doc, dict) or "schema" not in doc:
        raise InputError(f"{source} is not a results file: it names no schema; give a JSON file of pnp-trt bench.")
    if doc["schema"] != SCHEMA:
        raise InputError(
            f"{source} has the schema {doc['schema']!r}, this version reads {SCHEMA!r}; run the benchmark again."
        )
    for key, kind in _REQUIRED.items():
        if key not in doc:
            raise InputError(f"{source} lacks the key '{key}' of schema {SCHEMA}; run the benchmark again.")
        if not isinstance(doc[key], kind):
            found = type(doc[key]).__name__
            raise InputError(f"In {source} '{key}' is a {found}, not a {kind.__name__}; run the benchmark again.")
    for table, keys in _REQUIRED_IN_ROWS.items():
        for number, row in enumerate(doc[table]):
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                lacks = ", ".join(missing)
                raise InputError(f"In {source} row {number} of '{table}' lacks {lacks}; run the benchmark again.")


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, paths and tuples as JSON can hold them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    if git is None or not (root / ".git").exists():  # installed: a repository further up would not be ours
        return None, None
    try:
        head = _git(git, root, "rev-parse", "HEAD")
        return head or None, bool(_git(git, root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(git: str, root: Path, *arguments: str) -> str:
    done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

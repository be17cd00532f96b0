"""Runs that can be continued: a folder that remembers what it is of, and refuses to be anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .artifacts import digest, write_json
from .errors import InputError

RECORD = "run.json"


def claim(out: Path, settings: dict[str, Any], resume: bool, other: str = "choose another --out") -> None:
    """Refuse a folder that holds something else; remember what this run is.

    Args:
        out: the run's folder; made if it is missing.
        settings: everything that determines the run.
        resume: whether a run with the same settings may be there already.
        other: how the user keeps both, for the messages.

    Raises:
        InputError: if ``out`` holds other things, a run with other settings (which ones is said), or this run and
            ``resume`` is false.
    """
    settings = json.loads(json.dumps(settings, default=str))
    record = out / RECORD
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not record.is_file():
            raise InputError(f"{out} is not empty and holds no run of this kind; {other}")
        found = json.loads(record.read_text())
        if found.get("key") != digest(settings):
            differs = _difference(found.get("settings", {}), settings)
            raise InputError(f"{out} holds a run with other settings ({differs}); {other}")
        if not resume:
            raise InputError(f"{out} holds this run already; continue it with --resume, or {other}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, {"key": digest(settings), "settings": settings})


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first setting that differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {old} and is {new}"

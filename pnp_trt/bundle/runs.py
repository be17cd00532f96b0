"""Resumable runs: a folder records its run's settings and is refused for other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.files import is_temporary, make_folder, remove_temporaries
from ..io.replacing import shown
from .store import digest, write_json

RECORD = "run.json"


def claim(out: Path, settings: dict[str, Any], resume: bool, other: str = "choose another --out") -> None:
    """Record this run's settings in its folder; refuse a folder with other contents.

    Args:
        out: the run's folder; created if it is missing.
        settings: everything that determines the run.
        resume: whether the folder may contain a run with the same settings.
        other: how to keep both runs, for the messages.

    Raises:
        InputError: if ``out`` cannot be written, or contains other files, a damaged record, a run with other settings
            (the message names one), or this run while ``resume`` is false.
    """
    settings = json.loads(json.dumps(settings, default=str))
    record = out / RECORD
    names = _names(out)
    if names:
        if not record.is_file():
            raise InputError(f"{out} is not empty and holds no run of this kind ({shown(names)}); name another folder")
        recorded = read_record(record, other)
        if recorded.get("key") != digest(settings):
            differs = _difference(recorded.get("settings", {}), settings)
            raise InputError(f"{out} holds a run with other settings ({differs}); {other}")
        if not resume:
            raise InputError(f"{out} holds this run already; continue it with --resume, or {other}")
    make_folder(out)
    for folder in (out, *(path for path in out.rglob("*") if path.is_dir() and not path.is_symlink())):
        if folder.is_dir():  # a temporary folder may have been removed with its parent
            remove_temporaries(folder)
    write_json(record, {"key": digest(settings), "settings": settings})


def _names(out: Path) -> list[str]:
    """Names in a run's folder, except temporary files of a killed run.

    Raises:
        InputError: if it is a file or cannot be read.
    """
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; name a folder")
        return sorted(p.name for p in out.iterdir() if not is_temporary(p.name)) if out.exists() else []
    except OSError as e:
        raise InputError(f"{out} cannot be read ({e.strerror or e}); name another folder") from e


def read_record(path: Path, other: str) -> dict[str, Any]:
    """Read a JSON object that a run wrote for resuming.

    Args:
        other: what to do if it cannot be read, for the message.

    Raises:
        InputError: if it cannot be read, is truncated, or is not an object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror or e}); {other}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is damaged ({e}), so the run cannot be continued; {other}") from e
    if not isinstance(document, dict):
        raise InputError(f"{path} is damaged (it holds a {type(document).__name__}, not an object); {other}")
    return document


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first setting that differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {old} and is {new}"

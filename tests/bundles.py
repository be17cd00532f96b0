"""Edit bundles as an attacker could: change the manifest's JSON, replace files, and seal the manifest again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pnp_trt.bundle.store import MANIFEST, list_files, write_document


def document(folder: Path) -> dict[str, Any]:
    """Return the JSON of a bundle's manifest."""
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return value


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, *, files: bool = True) -> None:
    """Write the manifest again, with a new seal, after a change.

    Args:
        change: edits the document in place.
        files: hash the folder's files again before the change.
    """
    value = document(folder)
    if files:
        value["files"] = {name: record.to_json() for name, record in list_files(folder).items()}
    if change is not None:
        change(value)
    write_document(folder, value)

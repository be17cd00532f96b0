"""Finished pieces of a bench run, stored so that a killed run can resume; removed when the run completes."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..bundle.runs import RECORD, claim
from ..bundle.store import digest, write_json
from ..errors import InputError
from ..io.files import is_temporary, remove_temporaries, whole_file

_PIECE = re.compile(r".+-[0-9a-f]{16}\.(json|npz)")


class Work:
    """Finished pieces, identified by a name and a digest of everything that determines them.

    Args:
        folder: where the pieces are stored; None uses a temporary folder, from which no run can resume.
        settings: everything that determines the run: see :func:`~pnp_trt.bundle.runs.claim`.
        resume: whether to resume the run stored in ``folder``.

    Use it in a ``with`` block: after an error the folder stays if any piece is finished. Call ``done`` once the results
    are written, to remove the folder.

    Raises:
        InputError: if ``folder`` contains anything but this run, or contains this run and ``resume`` is false.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], resume: bool = False) -> None:
        if folder is None:
            if resume:
                raise InputError("--resume needs to know where the run is stored; repeat its --json or --work")
            self.folder, self.persistent = Path(tempfile.mkdtemp(prefix="pnp-trt-bench-")), False
        else:
            claim(folder, dict(settings), resume, other=f"remove {folder} or choose another --json or --work")
            self.folder, self.persistent = folder, True
        self._mine: set[Path] = set()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        nothing = all(path.name == RECORD or is_temporary(path.name) for path in self.folder.glob("*"))
        if not self.persistent or (error is not None and nothing):
            self.done()

    def done(self) -> None:
        """Remove the pieces, as the results are written. The user's own files stay, and then so does the folder."""
        if not self.folder.is_dir():
            return
        remove_temporaries(self.folder)
        pieces = [path for path in self.folder.iterdir() if _PIECE.fullmatch(path.name)]
        # the record last: without it, a run that is killed here could not be resumed
        for path in [*pieces, self.folder / RECORD]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder is not empty
            self.folder.rmdir()

    def has(self, name: str, key: Any, suffix: str = ".json") -> bool:
        """Whether a piece is finished."""
        return self._path(name, key, suffix).is_file()

    def table(self, name: str, key: Any, make: Callable[[], Any]) -> tuple[Any, bool]:
        """Return a piece stored as JSON, created if missing, and whether an earlier process created it."""
        path = self._path(name, key, ".json")
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8")), path not in self._mine
            except (ValueError, RecursionError):  # damaged: create it again
                pass
        value = json.loads(json.dumps(make(), default=_plain))
        write_json(path, value)
        self._mine.add(path)
        return value, False

    def arrays(self, name: str, key: Any, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return a piece stored as named arrays, created if missing."""
        path = self._path(name, key, ".npz")
        if path.is_file():
            try:
                with np.load(path) as stored:
                    return dict(stored)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # damaged: create it again
                pass
        value = dict(make())
        with whole_file(path) as temporary, temporary.open("wb") as f:
            np.savez(f, **value)  # type: ignore[arg-type]  # numpy's stub does not accept arrays as keywords
        self._mine.add(path)
        return value

    def _path(self, name: str, key: Any, suffix: str) -> Path:
        return self.folder / f"{name}-{digest(json.loads(json.dumps(key, default=_plain)))[:16]}{suffix}"


def _plain(value: Any) -> Any:
    """Convert numpy scalars, arrays and paths to JSON values."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

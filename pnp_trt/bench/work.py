"""What a bench run has finished, kept in a folder so that a killed run continues; gone once the run is whole."""

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
    """Finished pieces by name and by a digest of everything that determines them.

    Args:
        folder: where they are kept; None keeps them in a temporary folder, and nothing can be continued.
        settings: what the whole run is of: see :func:`~pnp_trt.bundle.runs.claim`.
        resume: whether to continue the run that ``folder`` holds.

    Use it in a ``with`` block: an error keeps the folder if anything is finished; ``done`` states that the results are
    written and the folder can go.

    Raises:
        InputError: if ``folder`` holds something else, or this run and ``resume`` is false.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], resume: bool = False) -> None:
        if folder is None:
            if resume:
                raise InputError("--resume needs the place of the run; name it with the same --json or --work")
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
        """Remove what was kept: the results are written. Files of the user stay, and so does the folder then."""
        if not self.folder.is_dir():
            return
        remove_temporaries(self.folder)
        pieces = [path for path in self.folder.iterdir() if _PIECE.fullmatch(path.name)]
        # the record last: without it a run that is killed here could not be continued
        for path in [*pieces, self.folder / RECORD]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty
            self.folder.rmdir()

    def has(self, name: str, key: Any, suffix: str = ".json") -> bool:
        """Whether a piece is finished."""
        return self._path(name, key, suffix).is_file()

    def table(self, name: str, key: Any, make: Callable[[], Any]) -> tuple[Any, bool]:
        """A piece that JSON can hold, made if it is not there; and whether an earlier process made it."""
        path = self._path(name, key, ".json")
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8")), path not in self._mine
            except (ValueError, RecursionError):  # damaged: made again
                pass
        value = json.loads(json.dumps(make(), default=_plain))
        write_json(path, value)
        self._mine.add(path)
        return value, False

    def arrays(self, name: str, key: Any, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """A piece of named arrays, made if it is not there."""
        path = self._path(name, key, ".npz")
        if path.is_file():
            try:
                with np.load(path) as found:
                    return dict(found)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # damaged: made again
                pass
        value = dict(make())
        with whole_file(path) as beside, beside.open("wb") as f:
            np.savez(f, **value)  # type: ignore[arg-type]  # numpy's signature has no arrays by name
        self._mine.add(path)
        return value

    def _path(self, name: str, key: Any, suffix: str) -> Path:
        return self.folder / f"{name}-{digest(json.loads(json.dumps(key, default=_plain)))[:16]}{suffix}"


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, and paths, as JSON can hold them."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

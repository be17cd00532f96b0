"""Images for a table of prompts, with full batches in the engine's calls; an interrupted run can be resumed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingDependency, PnpError
from ..io.inputs import parse_json, read_text
from ..runtime.images import FORMATS, encode_image, read_parameters, write_all_new
from ..runtime.pipeline import GeneratedImage, Pipeline, Prepared
from ..sampling.step_loop import SLOTS
from .engine import Engine

#: columns of a table, with the type of their values
COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": str, "seed": int, "steps": int, "guidance": float, "negative": str, "method": str, "schedule": str,
    "prompt_syntax": str,
}  # fmt: skip
#: images queued besides those in the engine's calls, so that no row stays empty
_AHEAD = 16
#: called with (images done, total)
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Tally:
    """Number of images that a run generated, and of those that existed before."""

    generated: int
    existing: int


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, each with a ``prompt`` and any of the other ``COLUMNS``; empty values are left out.

    Args:
        path: ``.txt``, a prompt per line; ``.jsonl``, an object per line; ``.csv`` with a header; or ``.parquet``.

    Raises:
        InputError: for another suffix, a file that cannot be read, an unknown column, a row without a prompt, or a
            value of the wrong type; the message has the row's number, counted from 1.
        MissingDependency: for ``.parquet`` without pyarrow.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        items: Iterable[Any] = _parquet(path)
    elif kind in (".txt", ".jsonl", ".csv"):
        text = read_text(path, "the prompts file")
        if kind == ".csv":
            items = csv.DictReader(io.StringIO(text))
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            if kind == ".txt":
                items = [{"prompt": line.strip()} for line in lines]
            else:
                items = [parse_json(ln, f"row {i}", "give one JSON object a line") for i, ln in enumerate(lines, 1)]
    else:
        raise InputError(f"the prompts file {path} is not .txt, .jsonl, .csv or .parquet; save it as one of these")
    rows = [_row(row, i) for i, row in enumerate(items, 1)]
    if not rows:
        raise InputError(f"the prompts file {path} has no row; give one prompt a line")
    return rows


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingDependency(f"{path} needs pyarrow; install with: pip install 'pnp-trt[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as e:  # pyarrow raises subclasses of both
        raise InputError(f"the prompts file {path} cannot be read ({e}); give a Parquet file") from None
    yield from table.to_pylist()


def _row(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(f"row {number} is {type(row).__name__}; give an object with a prompt")
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name not in COLUMNS:
            raise InputError(f"row {number} has the column '{name}'; known: {', '.join(COLUMNS)}")
        if value is None or (value == "" and name != "prompt"):
            continue
        try:
            values[name] = COLUMNS[name](value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"row {number}: {name} is {json.dumps(str(value)[:60])}; give a number") from None
    if not isinstance(row.get("prompt"), str):
        raise InputError(f"row {number} has no prompt; give one")
    return values


@dataclass(frozen=True)
class OfflinePlan:
    """The validated rows of a table, and which of them have no image yet.

    Attributes:
        rows: with their defaults and seeds.
        files: the image file of each row.
        missing: indices of the rows without an image.
    """

    rows: list[dict[str, Any]]
    files: list[Path]
    prepared: list[Prepared]
    missing: list[int]
    kind: str

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        rows: Iterable[Mapping[str, Any]],
        out: Path,
        *,
        defaults: Mapping[str, Any] | None = None,
        seed: int = 0,
        kind: str = "png",
    ) -> OfflinePlan:
        """A plan with one image file per row, OUT/00000001.png for the first.

        Existing files with the same parameters are kept, so that an interrupted run resumes, and several processes may
        share the work.

        Args:
            rows: from :func:`read_rows`.
            out: an existing folder.
            defaults: values of ``COLUMNS`` for rows that lack them.
            seed: seed of the first row; each next row adds 1.  Rows with their own seed override it.
            kind: ``png``, ``webp`` or ``jpeg``.

        Raises:
            InputError: for a row that cannot be served, or a file of another row in ``out``.
        """
        if kind not in FORMATS:
            raise InputError(f"the format is '{kind}'; known: {', '.join(FORMATS)}")
        common = dict(defaults or {})
        full = [{"seed": seed + i, **common, **row} for i, row in enumerate(rows)]
        files = [out / f"{i:08d}{FORMATS[kind][0]}" for i in range(1, len(full) + 1)]
        return cls.part(pipeline, range(len(full)), full, files, kind)

    @classmethod
    def part(
        cls, pipeline: Pipeline, indices: Iterable[int], rows: list[dict[str, Any]], files: list[Path], kind: str
    ) -> OfflinePlan:
        """A plan for some rows of a table, with their defaults and seeds; ``indices`` number them in messages.

        Raises:
            InputError: as for :meth:`of`.
        """
        prepared = [_prepared(pipeline, row, i) for i, row in zip(indices, rows, strict=True)]
        missing = [i for i, (file, each) in enumerate(zip(files, prepared, strict=True)) if not _there(file, each)]
        return cls(rows, files, prepared, missing, kind)


def generate(pipeline: Pipeline, plan: OfflinePlan, slots: int = SLOTS, progress: Progress | None = None) -> Tally:
    """Generate the missing images of a plan; each file is written atomically.

    If another process has written a row's image meanwhile, that file is kept.

    Raises:
        InputError: if another process has written another row's image to one of the files.
        PnpError: if an image cannot be generated or written; the images before it remain.
    """
    engine = Engine(pipeline, slots, _AHEAD)
    pending: dict[Future[list[GeneratedImage]], int] = {}
    todo = iter(plan.missing)
    done = existing = len(plan.files) - len(plan.missing)
    try:
        while True:
            while len(pending) < engine.slots + _AHEAD and (i := next(todo, None)) is not None:
                pending[engine.submit(plan.prepared[i]).future] = i
            if not pending:
                return Tally(len(plan.missing), existing)
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                i = pending.pop(future)
                (image,) = future.result()
                data = encode_image(image.pixels, image.parameters, plan.kind, plan.files[i])
                if not write_all_new({plan.files[i]: data}):
                    _there(plan.files[i], plan.prepared[i])  # another process was faster
                done += 1
                if progress is not None:
                    progress(done, len(plan.files))
    finally:
        engine.stop(drain=False)


def _prepared(pipeline: Pipeline, row: Mapping[str, Any], i: int) -> Prepared:
    try:
        prepared = pipeline.prepare(row["prompt"], **{name: row[name] for name in row if name != "prompt"})
        pipeline.check_step_method(prepared.method)
    except InputError as e:
        raise InputError(f"row {i + 1}: {e}") from None
    return prepared


def _there(file: Path, prepared: Prepared) -> bool:
    """Whether a row's image exists; raises ``InputError`` if the file has another row's image."""
    if not file.exists():
        return False
    try:
        parameters = read_parameters(file)
    except PnpError as e:
        raise InputError(f"{file} is not an image of this table ({e}); name another --out") from None
    if parameters != prepared.parameters(0):
        raise InputError(f"{file} has another row's image, of prompt {parameters.get('prompt')!r}; name another --out")
    return True

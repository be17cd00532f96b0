"""The results document: what was measured, on what, by which command; written whole or not at all, read with care.

The shape is published as the JSON Schema `pnp_trt/bench/schema.json`. Tables, pages and images are drawn from this
document and from nothing else.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.provenance import as_text, provenance
from ..bundle.store import write_text
from ..errors import InputError
from ..io.inputs import read_json
from ..io.json_schema import problem
from .metric import judges_quality
from .renames import current_names

SCHEMA = "pnp-trt/bench/3"
#: differs from the current one in names alone
_FORMER = "pnp-trt/bench/2"
SCHEMA_FILE = Path(__file__).with_name("schema.json")


def document(
    command: str | Sequence[str],
    *,
    cost: Sequence[Mapping[str, Any]] = (),
    methods_cost: Sequence[Mapping[str, Any]] = (),
    published: Sequence[Mapping[str, Any]] = (),
    engines: Sequence[Mapping[str, Any]] = (),
    device: Mapping[str, Any] | None = None,
    latency: Sequence[Any] = (),
    cold_start: Sequence[Mapping[str, Any]] = (),
    serving: Sequence[Mapping[str, Any]] = (),
    fidelity: Sequence[Mapping[str, Any]] = (),
    images: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    left_out: Sequence[Mapping[str, str]] = (),
    task_quality_evaluated: bool | None = None,
    task_quality_reason: str | None = None,
    accelerator: str | None = None,
) -> dict[str, Any]:
    """Put measurements and their provenance into one document of schema `pnp-trt/bench/3`.

    What was not measured is left out or null, and named in `left_out`; rows may be dicts or have a method `as_dict`.

    Args:
        command: the command line that ran: a string, or the arguments.
        cost: a row a network, as of `cost.cost_rows`: parameters, and MACs of one forward.
        methods_cost: a row a method, as of `cost.method_rows`.
        published: published figures beside ours, in the same unit.
        engines: a row a network of each engine: bytes, layers, reformats.
        device: the measured peaks of the device: name, peak_macs_per_s, peak_bytes_per_s, how.
        latency: `LatencyRow`s or their dicts, times in milliseconds, raw observations included.
        cold_start: seconds from a process's start to its first image, a row an engine.
        serving: queues of requests, a row an engine, as of `measure.serving.measure`.
        fidelity: a row a method, number of steps and w; a measured value is {"value", "low", "high", "count"}.
        images: {"columns", "rows" as of `encode_images`, "caption"}.
        settings: the options of the run; "suite" and "quick" are None and False where it does not state.
        left_out: {"what", "why"} of everything that was requested and not measured.
        task_quality_evaluated: whether `fidelity` states how good the images are, not only how close to the teacher's;
            None means that some row has a metric of quality.
        task_quality_reason: why it was not evaluated.
        accelerator: the accelerator's name where one was used, for the provenance.
    """
    rows = [_row(row) for row in fidelity]
    judged = any(judges_quality(row) for row in rows)
    evaluated = judged if task_quality_evaluated is None else task_quality_evaluated
    if not evaluated and task_quality_reason is None:
        task_quality_reason = "no image was compared with real ones in this run"
    return {
        "schema": SCHEMA,
        "provenance": provenance(command, device=accelerator),
        "settings": {"suite": None, "quick": False, **(settings or {})},
        "task_quality_evaluated": evaluated,
        "task_quality_reason": None if evaluated else task_quality_reason,
        "left_out": [dict(one) for one in left_out],
        "cost": [_row(row) for row in cost],
        "methods_cost": [_row(row) for row in methods_cost],
        "published": [_row(row) for row in published],
        "engines": [_row(row) for row in engines],
        "device": None if device is None else _row(device),
        "latency": [_row(row) for row in latency],
        "cold_start": [_row(row) for row in cold_start],
        "serving": [_row(row) for row in serving],
        "fidelity": rows,
        "images": None if images is None else dict(images),
    }


def encode_images(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an image grid as the document holds them: `pixels` becomes `png`, all else stays.

    rows: dicts with "label" and "pixels" (uint8 [N, H, W, 3], one image a column), and whatever else states what they
    show: "engine", "method", "steps", "guidance".  Returns the rows with "png": N PNG files in Base64.

    Raises:
        InputError: for pixels of another type or shape, or rows of different lengths.
    """
    from PIL import Image

    made: list[dict[str, Any]] = []
    for row in rows:
        pixels = row["pixels"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise InputError(
                f"The images of '{row['label']}' must be uint8 [N, H, W, 3], got {pixels.dtype} {pixels.shape}."
            )
        if made and len(made[0]["png"]) != len(pixels):
            raise InputError(
                f"'{row['label']}' has {len(pixels)} images for {len(made[0]['png'])} columns; give one a column."
            )
        files = []
        for one in pixels:
            stream = io.BytesIO()
            Image.fromarray(one).save(stream, "PNG", optimize=True)
            files.append(base64.b64encode(stream.getvalue()).decode())
        made.append({**{key: value for key, value in row.items() if key != "pixels"}, "png": files})
    return made


def decode_images(images: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """(label, uint8 [N, H, W, 3]) for every row of a document's `images`: the inverse of `encode_images`.

    Raises:
        InputError: for what is not a PNG in Base64.
    """
    from ..io.image_files import ImageError, decode_rgb

    found = []
    for row in images["rows"]:
        try:
            files = [io.BytesIO(base64.b64decode(one, validate=True)) for one in row["png"]]
            stack = np.stack([decode_rgb(one, "a PNG", ("PNG",)) for one in files])
        except (ValueError, ImageError) as error:  # ValueError: not Base64, no image, or images of several sizes
            reason = getattr(error, "reason", error)
            raise InputError(
                f"The images of '{row['label']}' are damaged ({reason}); run the benchmark again."
            ) from error
        found.append((row["label"], stack))
    return found


def write(doc: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `doc` as JSON to `path`, whole or not at all, and return the path. Folders are made where missing."""
    target = Path(path)
    write_text(as_text(doc, target), target)
    return target


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results document, also one of `pnp-trt/bench/2`, whose fields get their current names.

    Raises:
        InputError: with the reason, for a file that is missing, cut short or of another kind.
    """
    source = Path(path)
    doc = read_json(source, "the results file", "it may have been cut short: run the benchmark again")
    if isinstance(doc, dict) and doc.get("schema") == _FORMER:
        doc = current_names(doc) | {"schema": SCHEMA}
    check(doc, source)
    return doc


def check(doc: Any, source: str | os.PathLike[str]) -> None:
    """Raise InputError with the reason where `doc` is not a document of this schema; `source` names it."""
    if not isinstance(doc, dict) or "schema" not in doc:
        raise InputError(f"{source} is not a results file: it names no schema; give a JSON file of pnp-trt bench.")
    if doc["schema"] != SCHEMA:
        how = "run the benchmark again"
        if str(doc["schema"]).startswith("pnp-trt/bench/"):
            how = f"make a new one: pnp-trt bench --json {source}"
        raise InputError(f"{source} has the schema {doc['schema']!r}, this version reads {SCHEMA!r}; {how}.")
    found = problem(doc, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    if found:
        raise InputError(f"In {source} {found} (schema {SCHEMA}); run the benchmark again.")


def _row(row: Any) -> dict[str, Any]:
    return row.as_dict() if hasattr(row, "as_dict") else dict(row)

"""The results document: measurements, device and command; written atomically and validated when read.

Its JSON Schema is `pnp_trt/bench/schema.json`. Tables, pages and images are rendered from this document alone.
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
#: the previous schema, which differs from the current one only in field names
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

    Anything not measured is absent or null, and named in `left_out`. Rows may be dicts or have a method `as_dict`.

    Args:
        command: the command line that ran: a string, or the arguments.
        cost: one row per network, from `cost.cost_rows`: parameters, and MACs of one forward.
        methods_cost: one row per method, from `cost.method_rows`.
        published: published figures beside ours, in the same unit.
        engines: one row per network of each engine: bytes, layers, reformats.
        device: the measured peaks of the device: name, peak_macs_per_s, peak_bytes_per_s, how.
        latency: `LatencyRow`s or their dicts, times in milliseconds, raw observations included.
        cold_start: seconds from a process's start to its first image, one row per engine.
        serving: queues of requests, one row per engine, from `measure.serving.measure`.
        fidelity: one row per method, number of steps and w; a measured value is {"value", "low", "high", "count"}.
        images: {"columns", "rows" from `encode_images`, "caption"}.
        settings: the options of the run; "suite" and "quick" default to None and False.
        left_out: {"what", "why"} of everything that was requested but not measured.
        task_quality_evaluated: whether `fidelity` measures how good the images are, not only how close to the
            teacher's; None derives it from whether any row has a quality metric.
        task_quality_reason: why it was not evaluated.
        accelerator: name of the accelerator, if one was used, for the provenance.
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
    """Convert rows of an image grid for the document: `pixels` becomes `png`, all other fields are unchanged.

    rows: dicts with "label", "pixels" (uint8 [N, H, W, 3], one image per column), and optional descriptive fields such
    as "engine", "method", "steps", "guidance".  Returns the rows with "png": N PNG files in Base64.

    Raises:
        InputError: for pixels of another type or shape, or rows of different lengths.
    """
    from PIL import Image

    encoded: list[dict[str, Any]] = []
    for row in rows:
        pixels = row["pixels"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise InputError(
                f"The images of '{row['label']}' must be uint8 [N, H, W, 3], got {pixels.dtype} {pixels.shape}."
            )
        if encoded and len(encoded[0]["png"]) != len(pixels):
            raise InputError(
                f"'{row['label']}' has {len(pixels)} images for {len(encoded[0]['png'])} columns; give one per column."
            )
        files = []
        for image in pixels:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG", optimize=True)
            files.append(base64.b64encode(stream.getvalue()).decode())
        encoded.append({**{key: value for key, value in row.items() if key != "pixels"}, "png": files})
    return encoded


def decode_images(images: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Return (label, uint8 [N, H, W, 3]) of every row of a document's `images`: the inverse of `encode_images`.

    Raises:
        InputError: for data that is not a PNG in Base64.
    """
    from ..io.image_files import ImageError, decode_rgb

    decoded = []
    for row in images["rows"]:
        try:
            files = [io.BytesIO(base64.b64decode(item, validate=True)) for item in row["png"]]
            stack = np.stack([decode_rgb(item, "a PNG", ("PNG",)) for item in files])
        except (ValueError, ImageError) as error:  # ValueError: not Base64, not an image, or images of different sizes
            reason = getattr(error, "reason", error)
            raise InputError(
                f"The images of '{row['label']}' are damaged ({reason}); run the benchmark again."
            ) from error
        decoded.append((row["label"], stack))
    return decoded


def write(doc: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `doc` atomically as JSON to `path` and return the path. Missing folders are created."""
    target = Path(path)
    write_text(as_text(doc, target), target)
    return target


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results document. In one of `pnp-trt/bench/2`, fields get their current names.

    Raises:
        InputError: with the reason, for a file that is missing, truncated or of another kind.
    """
    source = Path(path)
    doc = read_json(source, "the results file", "it may have been cut short: run the benchmark again")
    if isinstance(doc, dict) and doc.get("schema") == _FORMER:
        doc = current_names(doc) | {"schema": SCHEMA}
    check(doc, source)
    return doc


def check(doc: Any, source: str | os.PathLike[str]) -> None:
    """Raise InputError with the reason if `doc` does not follow this schema; `source` names the file."""
    if not isinstance(doc, dict) or "schema" not in doc:
        raise InputError(
            f"{source} is not a results file, as it has no 'schema'; give a JSON file written by pnp-trt bench."
        )
    if doc["schema"] != SCHEMA:
        how = "run the benchmark again"
        if str(doc["schema"]).startswith("pnp-trt/bench/"):
            how = f"make a new one: pnp-trt bench --json {source}"
        raise InputError(f"{source} has the schema {doc['schema']!r}, but this version reads {SCHEMA!r}; {how}.")
    invalid = problem(doc, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    if invalid:
        raise InputError(f"In {source} {invalid} (schema {SCHEMA}); run the benchmark again.")


def _row(row: Any) -> dict[str, Any]:
    return row.as_dict() if hasattr(row, "as_dict") else dict(row)

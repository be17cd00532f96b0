"""``pnp-trt generate``: one file per row with the pipeline's image, generated exactly once despite interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pnp_trt.errors import InputError
from pnp_trt.runtime.images import read_parameters
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.serve.offline import OfflinePlan, generate, read_rows

from ..conftest import Result

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red apple", "steps": 3, "seed": 9}, {"prompt": "a panda", "guidance": 5.0, "method": "guided"},
    {"prompt": "", "steps": 1, "schedule": "dpm++"}, {"prompt": "a red apple"},
]  # fmt: skip


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / name
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if name.endswith(".parquet"):
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), file)
    elif name.endswith(".csv"):
        lines = [",".join(columns), *(",".join(json.dumps(r[c]) if c in r else "" for c in columns) for r in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_has_the_same_rows_in_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [row for row in ROWS if row["prompt"]] if suffix == "csv" else ROWS
    assert read_rows(written(tmp_path, f"rows.{suffix}", rows)) == rows


def test_rows_can_set_their_prompt_syntax(engines: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    rows = [{"prompt": "a (red:1.5) apple", "prompt_syntax": "plain"}, {"prompt": "a (red:1.5) apple"}]
    table, out = written(tmp_path, "rows.csv", rows), tmp_path / "out"
    cli("generate", table, "--out", out, "--engine", "guided", "--steps", 2, "--prompt-syntax", "a1111")
    pipeline = Pipeline.load(engines / "guided", provider="cpu")
    for i, syntax in enumerate(("plain", "a1111")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (alone,) = pipeline("a (red:1.5) apple", steps=2, seed=i, prompt_syntax=syntax)
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"{i + 1:08d}.png")), alone.pixels)


def test_files_equal_the_pipelines_images_and_a_second_run_keeps_them(
    engines: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    table, out = written(tmp_path, "rows.jsonl", ROWS), tmp_path / "out"
    command = ("generate", table, "--out", out, "--engine", "guided", "--steps", 2, "--seed", 20, "--slots", 3)
    assert "4 images generated" in cli(*command).out
    pipeline = Pipeline.load(engines / "guided", provider="cpu")
    files = sorted(out.iterdir())
    assert [f.name for f in files] == [f"{i:08d}.png" for i in range(1, 5)]
    for i, (file, row) in enumerate(zip(files, ROWS, strict=True)):
        options = {"steps": 2, "seed": 20 + i, **row}
        (alone,) = pipeline(options.pop("prompt"), **options)
        np.testing.assert_array_equal(np.asarray(Image.open(file)), alone.pixels)
        assert read_parameters(file) == alone.parameters
    before = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    assert "1 images generated" in (again := cli(*command)).out and "3 existed already" in again.out
    assert [f.stat().st_mtime_ns for f in (*files[:2], files[3])] == [*before[:2], before[3]] and files[2].exists()
    refused = cli(*command, "--guidance", 4)
    assert refused.code == 2 and "has another row's image" in refused.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "has no row"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', "row 2 has no prompt"),
        ("a.jsonl", '{"prompt": "a", "stesp": 5}\n', "row 1 has the column 'stesp'; known: prompt, seed"),
        ("a.jsonl", '{"prompt": "a", "steps": "many"}\n', 'row 1: steps is "many"; give a number'),
        ("a.jsonl", "{\n", "row 1 is not complete JSON"),
        ("a.jsonl", "[]\n", "row 1 is list"),
        ("a.xlsx", "", "is not .txt, .jsonl, .csv or .parquet"),
        ("a.parquet", "no", "cannot be read"),
    ],
)
def test_errors_in_a_table_name_the_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_an_invalid_row_is_refused_before_any_image_is_generated(engines: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(engines / "guided", provider="cpu", threads=1)
    with pytest.raises(InputError, match="row 2: guidance is 30"):
        OfflinePlan.of(pipeline, [{"prompt": "a"}, {"prompt": "b", "guidance": 30.0}], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_resumes_and_generates_every_row_once(engines: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"apple {i}", "steps": 40} for i in range(24)]
    table, out = written(tmp_path, "rows.jsonl", rows), tmp_path / "out"
    command = [sys.executable, "-m", "pnp_trt", "generate", str(table), "--out", str(out), "--engine", "guided",
               "--provider", "cpu", "--slots", "2"]  # fmt: skip
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out.is_dir() and len(list(out.glob("*.png"))) >= 2):
        assert child.poll() is None and time.monotonic() < deadline
    child.send_signal(signal.SIGKILL)
    child.wait()
    first_files = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert len(first_files) >= 2
    pipeline = Pipeline.load(engines / "guided", provider="cpu", threads=1)
    tally = generate(pipeline, OfflinePlan.of(pipeline, rows, out, defaults={"guidance": 3.0}), slots=4)
    assert tally.existing == len(first_files) and tally.generated == len(rows) - len(first_files)
    files = sorted(out.glob("*.png"))
    assert [read_parameters(file)["prompt"] for file in files] == [row["prompt"] for row in rows]
    assert all(file.stat().st_mtime_ns == first_files[file.name] for file in files if file.name in first_files)

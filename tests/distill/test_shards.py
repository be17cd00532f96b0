"""States made in parts, on several machines, equal those of one run; rows are read from the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnp_trt.distill.states import MappedRows

from ..conftest import Result

Cli = Callable[..., Result]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_mapped_rows_equal_the_joined_tensors(lengths: list[int], data: st.DataObject) -> None:
    parts = [torch.randn(n, 2, 3) for n in lengths]
    joined, rows = torch.cat(parts), MappedRows(parts)
    assert len(rows) == len(joined)
    index = data.draw(st.lists(st.integers(0, len(joined) - 1), max_size=6))
    assert torch.equal(rows[index], joined[torch.tensor(index, dtype=torch.int64)])
    assert torch.equal(rows[torch.tensor(index, dtype=torch.int64)], rows[index])
    assert torch.equal(rows[len(joined) - 1], joined[-1])
    for outside in (len(joined), -1):
        with pytest.raises(IndexError):
            rows[outside]


def test_separately_made_shards_equal_those_of_one_run(cli: Cli, micro_base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na blue car\na cat\n")
    source = ["--base", micro_base, "--prompts", prompts, "--num-states", 1300]
    whole = cli("distill", "states", *source, "--states-dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    names = sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors"))
    assert f"{len(names)} of {len(names)} shards are in" in whole.out and len(names) > 1
    middle = len(names) // 2
    one = cli("distill", "states", *source, "--states-dir", tmp_path / "a", "--shards", f"0-{middle - 1}")
    assert one.code == 0 and f"{middle} of {len(names)} shards are in" in one.out, one.err
    other = cli("distill", "states", *source, "--states-dir", tmp_path / "b", "--shards", f"{middle}-{len(names) - 1}")
    assert other.code == 0, other.err
    for path in (tmp_path / "b").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").glob("*.safetensors")) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # training reuses all of them and makes none
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("*.safetensors")}
    small = ["--steps", 2, "--batch", 4, "--warmup", 1, "--rank", 8, "--grid-steps", 0]
    done = cli("distill", "guidance", *source, "--states-dir", tmp_path / "a", "--out", tmp_path / "guide", *small)
    assert done.code == 0, done.err
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "3-1"], "the shards are 3 to 1; they must be in order, from 0 to"),
        (["--shards", "0-99999"], "the shards are 0 to 99999; they must be in order"),
        (["--shards", "all"], "--shards is 'all'; give the first and the last number, such as 0-9"),
        (["--states", "forward"], "forward states are noised images"),
        (["--num-states", "80"], "holds the states of another run"),
    ],
)
def test_bad_options_are_refused(cli: Cli, micro_base: Path, tmp_path: Path, options: list[str], message: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    folder = tmp_path / "states"
    if "--num-states" in options:
        folder.mkdir()
        (folder / "states.json").write_text('{"key": "another"}')
    done = cli("distill", "states", "--base", micro_base, "--prompts", prompts, "--states-dir", folder, *options)
    assert done.code == 2 and message in done.err, done.err
    assert done.err.count("\n") <= 2

"""Finished pieces of a run: stored, reused for an equal key, refused if they are of another run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pnp_trt.bench.work import Work
from pnp_trt.errors import InputError


def forbidden() -> dict:
    raise AssertionError("made twice")


def test_pieces_are_reused_and_marked_as_from_an_earlier_process(tmp_path: Path) -> None:
    folder = tmp_path / "b.json.partial"
    with Work(folder, {"steps": 8}) as work:
        piece = work.table("latency", [8, (1, 2)], lambda: [{"p50_ms": np.float32(1.5), "at": (1, 2)}])
        assert piece == ([{"p50_ms": 1.5, "at": [1, 2]}], False)
        assert work.table("latency", [8, (1, 2)], forbidden) == piece  # created by this process
        work.arrays("cell", ["a"], lambda: {"pixels": np.ones((2, 3), np.uint8)})
    with Work(folder, {"steps": 8}, resume=True) as work:
        assert work.has("latency", [8, (1, 2)]) and not work.has("latency", [8, (1, 3)])
        assert work.table("latency", [8, (1, 2)], forbidden) == (piece[0], True)
        assert work.arrays("cell", ["a"], forbidden)["pixels"].dtype == np.uint8
        work.done()
    assert not folder.exists()


def test_finished_pieces_are_kept_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Work(tmp_path / "w", {}) as work:
        work.table("a", 1, lambda: 1)
        work.table("b", 1, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [p.name[0] for p in sorted((tmp_path / "w").iterdir())] == ["a", "r"]  # the piece, and run.json
    with pytest.raises(InputError), Work(tmp_path / "v", {}):
        raise InputError("before anything was measured")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("damage", [b"", b"half a fi", b'{"x": '])
def test_a_damaged_piece_is_created_again(tmp_path: Path, damage: bytes) -> None:
    with Work(tmp_path / "w", {}) as work:
        work.table("t", 0, lambda: 1)
        work.arrays("n", 0, lambda: {"x": np.zeros(2)})
        for path in (tmp_path / "w").glob("[tn]-*"):
            path.write_bytes(damage)
        assert work.table("t", 0, lambda: 2)[0] == 2
        assert work.arrays("n", 0, lambda: {"x": np.ones(2)})["x"].sum() == 2


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    Work(folder, {"rounds": 4, "seals": {"a": "1"}})
    with pytest.raises(InputError, match="holds this run already; continue it with --resume"):
        Work(folder, {"rounds": 4, "seals": {"a": "1"}})
    with pytest.raises(InputError, match=r"other settings \(rounds was 4 and is 5\)"):
        Work(folder, {"rounds": 5, "seals": {"a": "1"}}, resume=True)
    with pytest.raises(InputError, match=r"seals.a was 1 and is 2"):
        Work(folder, {"rounds": 4, "seals": {"a": "2"}}, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(
        InputError, match=r"not empty and holds no run of this kind \(thesis.txt\); name another folder$"
    ):
        Work(tmp_path / "mine", {}, resume=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_without_a_folder_the_pieces_are_removed() -> None:
    with Work(None, {}) as work:
        work.table("a", 1, lambda: 1)
        folder = work.folder
    assert not folder.exists()
    with pytest.raises(InputError, match="--resume needs to know where the run is stored"):
        Work(None, {}, resume=True)

"""Bundles appear complete or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pnp_trt.bundle.store import lock, whole_folder, write_json
from pnp_trt.errors import PnpError


def test_a_folder_appears_only_if_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with pytest.raises(RuntimeError), whole_folder(target) as work:
        (work / "a").write_text("half")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(target) as work:
        (work / "a").write_text("whole")
        assert not target.exists()
    assert (target / "a").read_text() == "whole"


def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with whole_folder(target) as work:
        (work / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(target) as work:
        (work / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    with whole_folder(target) as work:
        (work / "b").write_text("new")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    program = (
        "import sys, time; from pathlib import Path; from pnp_trt.bundle.store import whole_folder\n"
        f"with whole_folder(Path({str(target)!r})) as work:\n"
        "    (work / 'a').write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with whole_folder(target) as work:
        (work / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_two_writers_take_turns(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    program = (
        "import sys, time; from pathlib import Path; from pnp_trt.bundle.store import lock\n"
        f"with lock(Path({str(target)!r})):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None and child.stdout.readline() == b"held\n"
    with (
        pytest.warns(UserWarning, match="waiting for another process"),
        pytest.raises(PnpError, match="another process has been writing"),
        lock(target, timeout=0.1),
    ):
        pass
    child.stdin.close()
    child.wait()
    child.stdout.close()
    with lock(target, timeout=600):  # raises unless the lock is free
        pass


def test_json_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]

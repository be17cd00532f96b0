"""Output paths are checked before the work, files appear complete or not at all, and links are followed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pnp_trt.errors import InputError, PnpError
from pnp_trt.io import files
from pnp_trt.io.files import (
    check_replaceable_folder,
    check_writable_file,
    check_writable_folder,
    is_temporary,
    lock,
    whole_file,
    whole_folder,
    write_bytes,
    write_new,
)

#: command prefix that takes away root's right to ignore permissions; empty for other users
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _bad_places(tmp: Path) -> dict[str, Path]:
    (tmp / "file").write_text("precious")
    (tmp / "folder").mkdir()
    (tmp / "loop").symlink_to("loop")
    return {
        "below a file": tmp / "file" / "x",
        "below a loop": tmp / "loop" / "x",
        "a loop": tmp / "loop",
        "a long name": tmp / ("n" * 300),
        "below a long name": tmp / ("n" * 300) / "x",
        "a long path": tmp.joinpath(*["abcdefgh"] * 600),
        "in /proc": Path("/proc/x"),
        "below a device": Path("/dev/null/x"),
        "a zero byte": tmp / "a\0b",
    }


@pytest.mark.parametrize(
    "name",
    ["a long name", "a long path", "a loop", "a zero byte", "below a device", "below a file", "below a long name",
     "below a loop", "in /proc"],
)  # fmt: skip
@pytest.mark.parametrize("check", [check_writable_file, check_writable_folder, check_replaceable_folder])
def test_an_unwritable_path_is_refused_and_nothing_is_left(
    tmp_path: Path, name: str, check: Callable[[Path, str], None]
) -> None:
    place = _bad_places(tmp_path)[name]
    before = names(tmp_path)
    with pytest.raises(InputError, match=r"^--html .* cannot be written \(.+\); name another (file|folder)$"):
        check(place, "--html")
    assert names(tmp_path) == before and (tmp_path / "file").read_text() == "precious"


def test_a_folder_is_not_a_file_and_a_file_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for place in (tmp_path, Path(), Path("/"), Path()):
        with pytest.raises(InputError, match="is a folder; name a file"):
            check_writable_file(place, "--json")
    for check in (check_writable_folder, check_replaceable_folder):
        with pytest.raises(InputError, match="is a file; name a folder"):
            check(file)
    for place in (Path(), Path("/"), Path.cwd().parent):
        with pytest.raises(InputError, match="is the current folder or one above it"):
            check_replaceable_folder(place)
    if os.path.ismount("/proc"):
        with pytest.raises(InputError, match="mount point|cannot be written"):
            check_replaceable_folder(Path("/proc"))


def test_writable_paths_pass_and_are_unchanged(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = names(tmp_path)
    for place in (tmp_path / "x", tmp_path / "a" / "b" / "c", tmp_path / "link" / "x", tmp_path / "dangling"):
        check_writable_file(place)
        check_writable_folder(place)
        check_replaceable_folder(place)
    check_writable_folder(tmp_path / "link")
    check_replaceable_folder(tmp_path / "link")
    check_writable_file(Path("/dev/null"))
    assert names(tmp_path) == before and names(tmp_path / "target") == []


PROGRAM = """
import sys; from pathlib import Path; from pnp_trt.io import files; from pnp_trt.errors import PnpError
for name in ("check_writable_file", "check_writable_folder", "check_replaceable_folder"):
    try: getattr(files, name)(Path(sys.argv[1])); print("fine")
    except PnpError as e: print(e.exit_code, e)
"""


def test_a_read_only_folder_is_refused_without_roots_rights(tmp_path: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    (folder / "old.json").write_text("{}")
    (tmp_path / "guarded.json").write_text("{}")
    (tmp_path / "guarded.json").chmod(0o444)
    folder.chmod(0o555)
    try:
        for place in (folder / "x", folder / "a" / "b"):
            done = subprocess.run(
                [*UNPRIVILEGED, sys.executable, "-c", PROGRAM, place], capture_output=True, text=True, check=True
            )
            lines = done.stdout.splitlines()
            assert len(lines) == 3 and all(line.startswith("2 --out") for line in lines), done.stdout
            assert all("Permission denied" in line for line in lines)
        done = subprocess.run(
            [*UNPRIVILEGED, sys.executable, "-c", PROGRAM, tmp_path / "guarded.json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "it is read-only" in done.stdout.splitlines()[0]
    finally:
        folder.chmod(0o755)
    assert names(folder) == ["old.json"]


def test_a_device_is_written_to_and_stays_a_device(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    write_bytes(b"results", fifo)
    reader.join(30)
    assert received == [b"results"] and stat.S_ISFIFO(fifo.stat().st_mode)
    with pytest.raises(PnpError, match=r"/dev/full could not be written \(No space left on device\).*free some space"):
        write_bytes(b"results", Path("/dev/full"))
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("sub/real")
    (tmp_path / "sub").mkdir()
    for text in (b"one", b"two"):
        write_bytes(text, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "sub" / "real").read_bytes() == text
    assert names(tmp_path) == ["link", "sub"] and names(tmp_path / "sub") == ["real"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_default_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(b"x", tmp_path / "bytes")
        write_new(b"x", tmp_path / "new")
        with whole_file(tmp_path / "file") as beside:
            beside.unlink()
            os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors creates files
        with whole_folder(tmp_path / "folder") as work:
            (work / "x").touch()
    finally:
        os.umask(before)
    for name in ("bytes", "new", "file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_name_of_maximum_length_can_be_written(tmp_path: Path) -> None:
    name = "n" * 255
    check_writable_file(tmp_path / name)
    write_bytes(b"x", tmp_path / name)
    assert names(tmp_path) == [name]
    (tmp_path / name).unlink()
    with lock(tmp_path / name), whole_folder(tmp_path / name) as work:
        (work / "x").touch()
    assert (tmp_path / name / "x").exists()


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        write_new(b"other", tmp_path / "x")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        write_new(b"other", tmp_path / "link")
    assert (tmp_path / "x").read_text() == "precious" and names(tmp_path) == ["link", "x"]


def test_new_files_can_be_written_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_new(b"one", tmp_path / "x")
    with pytest.raises(FileExistsError):
        write_new(b"two", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"one" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_target_of_a_link_is_replaced_and_the_link_stays(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    real = tmp_path / "store" / "v1"
    real.mkdir(parents=True)
    (real / "old").touch()
    (tmp_path / "current").symlink_to("store/v1")
    with lock(tmp_path / "current"), whole_folder(tmp_path / "current") as work:
        (work / "new").touch()
    assert (tmp_path / "current").is_symlink() and names(real) == ["new"]
    assert names(tmp_path) == ["current", "store"]
    assert names(tmp_path / "store") == [".v1.lock", "v1"]
    (tmp_path / "dangling").symlink_to("store/v2")
    with whole_folder(tmp_path / "dangling") as work:
        (work / "new").touch()
    assert (tmp_path / "dangling").is_symlink() and names(tmp_path / "store" / "v2") == ["new"]


def test_leftover_links_are_removed_and_similar_names_stay(tmp_path: Path) -> None:
    """Earlier versions left links of this name behind; names that only resemble it belong to the user."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (tmp_path / ".thing.partial-abcd1234").symlink_to("elsewhere")
    for mine in (".thing.partial-notes", ".thingx.partial-abcd1234", ".thing.partial-abcd12345"):
        (tmp_path / mine).mkdir()
    with whole_folder(tmp_path / "thing") as work:
        (work / "x").touch()
    assert names(tmp_path) == [
        ".thing.partial-abcd12345", ".thing.partial-notes", ".thingx.partial-abcd1234", "elsewhere", "thing",
    ]  # fmt: skip
    assert names(tmp_path / "elsewhere") == ["precious"]
    with whole_folder(tmp_path / "a[b]*") as work:  # not a glob pattern
        (work / "x").touch()
    assert (tmp_path / "a[b]*" / "x").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_must_not_be_removed_is_put_back(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "thesis").write_text("precious")

    def removable(folder: Path) -> None:
        assert (folder / "thesis").exists()
        raise InputError("no")

    with pytest.raises(InputError, match="no"), whole_folder(tmp_path / "thing", removable) as work:
        (work / "x").touch()
    assert names(tmp_path) == ["thing"] and names(tmp_path / "thing") == ["thesis"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "old").touch()
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path / "thing") as work:
        (work / "new").touch()
    assert names(tmp_path) == ["thing"] and names(tmp_path / "thing") == ["old"]


def test_waiting_gives_a_warning_and_an_impossible_lock_fails_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pnp_trt.io.files import lock\n"
        f"with lock(Path({str(tmp_path / 'x')!r})): print('locked', flush=True); sys.stdin.readline()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None and child.stdout.readline() == b"locked\n"

    def release(message: object, *_: object, **__: object) -> None:
        assert str(message) == f"waiting for another process that is writing {tmp_path / 'x'}"
        child.stdin.close()  # type: ignore[union-attr]

    with warnings.catch_warnings():
        warnings.showwarning = release  # type: ignore[assignment]
        warnings.simplefilter("always")
        with lock(tmp_path / "x", timeout=600):
            assert child.stdin.closed
    child.wait()
    child.stdout.close()
    for place in (Path("/proc/x"), tmp_path / "x" / "y"):
        (tmp_path / "x").touch()
        with pytest.raises(InputError, match="cannot be written"), lock(place):
            pytest.fail("there can be no lock")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_removes_partial_output(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import time; from pathlib import Path; from pnp_trt.io import process\n"
        "from pnp_trt.io.files import whole_folder\n"
        "def work():\n"
        f"    with whole_folder(Path({str(tmp_path / 'thing')!r})) as folder:\n"
        "        (folder / 'a').touch(); print('ready', flush=True); time.sleep(600)\n"
        "process.run(work)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # background jobs of a shell ignore SIGINT, and their children inherit that
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    if number == signal.SIGTERM:
        child.send_signal(number)  # as timeout(1) does
    errors = child.communicate(timeout=600)[1]
    assert child.returncode == 128 + number and names(tmp_path) == []
    assert errors.startswith("pnp-trt: interrupted" if number == signal.SIGINT else "pnp-trt: terminated")
    assert "Traceback" not in errors


def test_a_signal_waits_for_a_deferred_block(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pnp_trt.io import process\n"
        "def work():\n"
        "    with process.deferred():\n"
        "        for number in range(30):\n"
        f"            open({str(tmp_path)!r} + f'/{{number}}', 'w').close()\n"
        "            if number == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    open({str(tmp_path)!r} + '/never', 'w').close()\n"
        "process.run(work)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 143 and len(names(tmp_path)) == 30, done.stderr


def test_a_child_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        f"import time, os; open({str(tmp_path / 'pid')!r} + '.part', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'pid')!r} + '.part', {str(tmp_path / 'pid')!r})\n"
        "def work():\n"
        f"    open({str(tmp_path / 'half')!r}, 'w').close()\n"
        "    try: print('ready', flush=True); time.sleep(600)\n"
        f"    finally: os.unlink({str(tmp_path / 'half')!r})\n"
        "from pnp_trt.io import process; process.run(work)\n"
    )
    parent = (
        "import sys; from pnp_trt.io import process\n"
        f"process.run(lambda: process.run_child([sys.executable, '-c', {child!r}]))\n"
    )
    running = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert running.stdout is not None and running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == 143
    running.stdout.close()
    assert not (tmp_path / "half").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [("> /dev/full", 1, "standard output cannot be written (No space left on device)"), ("| true", 141, "")],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_unwritable_standard_output_is_reported(output: str, code: int, said: str, buffered: bool) -> None:
    program = "import sys, time; from pnp_trt.cli import main; sys.argv[1:] = ['--version']; time.sleep(.5); main()"
    env = {**os.environ, **({} if buffered else {"PYTHONUNBUFFERED": "1"})}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c {program!r} {output}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("name", [".run.json.abc_1234", ".states.json.zzzzzzzz", ".thing.partial-0123abcd", ".x.lock"])
def test_temporary_names_are_recognised(name: str) -> None:
    assert is_temporary(name)
    assert not any(is_temporary(other) for other in (name[1:], f"{name}.txt", "run.json", ".run.json", ".gitignore"))

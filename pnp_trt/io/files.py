"""Writing files and folders: whole or not at all, under a lock, and checked before the work begins.

Everything that the package writes goes through here. A file or folder is first written beside its final place under a
temporary name, ``.NAME.partial-XXXXXXXX``, and then renamed. A killed process can leave such a name behind; nothing
else that it leaves is unfinished, and :func:`is_temporary` recognises it.

A symbolic link is followed: what it leads to is written or replaced, and the link stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError, PnpError
from .os_errors import FULL_DISK, advice, reason
from .process import deferred

#: bytes in the longest file name that common file systems take
_LONGEST_NAME = 255
#: ``.NAME.partial-XXXXXXXX``, and the names that earlier versions left behind
_TEMPORARY = re.compile(
    r"\.(.+\.partial-[a-z0-9_]{8}|(run|states)\.json\.[a-z0-9_]{8}|(pictures|grid)\.png\.part)", re.DOTALL
)
#: seconds of waiting for another process before the user is told
_PATIENCE = 1.0


def is_temporary(name: str) -> bool:
    """Whether a file of this name was being written by a process that was killed, or is a lock; never a user's file."""
    return bool(_TEMPORARY.fullmatch(name)) or (name.startswith(".") and name.endswith(".lock"))


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left in ``folder``; the caller is the only process that writes there."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def remove_temporaries_of(target: Path) -> None:
    """Remove what killed processes left beside ``target`` while they wrote it; the caller holds its lock."""
    pattern = re.compile(re.escape(f".{_stem(target.name)}.partial-") + "[a-z0-9_]{8}")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            _remove(path)


def failure(folder: Path, error: OSError) -> str:
    """The sentence for a folder that could not be made whole."""
    hint = "free some space" if error.errno in FULL_DISK else "check the file named"
    return f"{folder} could not be made ({reason(error)}); nothing was written; {hint}, or choose another --out"


# ---------------------------------------------------------------------------------------------------------- checks


def check_writable_file(path: Path, option: str = "--out") -> None:
    """Refuse a place where no file can be written, before the work; a temporary file is made there and removed.

    Args:
        option: what the user gave the path with, for the message.

    Raises:
        InputError: for a folder, a read-only file or folder, a place below a file, a link loop, a name that is too
            long, a full disk, and whatever else the system refuses.
    """
    with _refusing(path, option, "file"):
        target = _resolved(path)
        if target.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file")
        if target.exists():
            mode = target.stat().st_mode
            if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
                raise InputError(f"{option} {path} is a device or a socket; name a file")
            if not os.access(target, os.W_OK) or _guarded(target):
                raise InputError(f"{option} {path} cannot be written (it is read-only); name another file")
            if not stat.S_ISREG(mode):  # /dev/stdout, a pipe: written to, not replaced
                return
        _probe(target.parent)


def check_writable_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that files cannot be written into, before the work; it need not exist yet.

    Raises:
        InputError: as :func:`check_writable_file`, and if ``path`` is a file.
    """
    with _refusing(path, option, "folder"):
        target = _resolved(path)
        if target.exists() and not target.is_dir():
            raise InputError(f"{option} {path} is a file; name a folder")
        _probe(target)


def check_replaceable_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that :func:`whole_folder` cannot put in place, before the work.

    Raises:
        InputError: as :func:`check_writable_folder`, and for the current folder, a folder above it, and a mount point.
    """
    check_writable_folder(path, option)
    with _refusing(path, option, "folder"):
        target = _resolved(path)
        if not target.name or Path.cwd().is_relative_to(target):
            raise InputError(f"{option} {path} is the current folder or one above it; name a new folder")
        if os.path.ismount(target):
            raise InputError(f"{option} {path} is a mount point and cannot be replaced; name a folder inside it")
        _probe(target.parent)


@contextlib.contextmanager
def _refusing(path: Path, option: str, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        said, what = e.strerror or e, advice(e, f"name another {kind}")
        raise InputError(f"{option} {_short(path)} cannot be written ({said}); {what}") from e
    except ValueError as e:  # a zero byte
        raise InputError(f"{option} {_short(path)} cannot be written ({e}); name another {kind}") from e


def _guarded(target: Path) -> bool:
    """Whether ``target`` is another user's in a folder, such as /tmp, where only its owner may replace it."""
    folder = target.parent.stat()
    users = (target.stat().st_uid, folder.st_uid)
    return bool(folder.st_mode & stat.S_ISVTX) and getattr(os, "geteuid", lambda: 0)() not in (0, *users)


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-100:]}"


def _resolved(path: Path) -> Path:
    """Where a path leads, all links followed; the last part need not exist.

    Raises:
        OSError: for a loop of links, a name that is too long, or a folder that may not be entered.
    """
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        os.lstat(target)  # a name that is too long, or a parent that is a file, is refused here
        target.stat()  # a loop of links is refused here
    for part in target.parts[1:]:
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return target


def _probe(folder: Path) -> None:
    """Write in ``folder``, or where it would have to be made, and remove what was written."""
    base = folder
    while not base.exists():
        base = base.parent
    if not base.is_dir():
        raise OSError(errno.ENOTDIR, f"{base} is a file")
    with tempfile.TemporaryFile(dir=base) as f:  # it has no name where the system can, so that no kill leaves it
        f.write(bytes(4096))  # a file of no bytes can be made on a full disk
        f.flush()


# ----------------------------------------------------------------------------------------------------------- files


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; where ``folder`` is a link, what it leads to.

    Raises:
        InputError: if it cannot be made.
    """
    try:
        _resolved(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        said = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"the folder {_short(folder)} cannot be made ({said}); choose another --out") from e


def temporary_beside(target: Path) -> Path:
    """A new empty file beside ``target``, with the permissions that any new file of this user has."""
    while True:
        path = _temporary_name(target)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return path


def make_temporary_folder(target: Path) -> Path:
    """A new empty folder beside ``target``."""
    while True:
        path = _temporary_name(target)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{_stem(target.name)}.partial-{secrets.token_hex(4)}")


def _stem(name: str) -> str:
    """A name that leaves room for a prefix and a suffix."""
    if len(os.fsencode(name)) <= _LONGEST_NAME - 20:
        return name
    return f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``target`` when the block ends well, and vanishes otherwise.

    Raises:
        InputError: if the folder cannot be written to.
        PnpError: if writing fails midway; what was there before is untouched.
    """
    place = _where(target)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = temporary_beside(place)
    except OSError as e:
        what = advice(e, "give a place that can.")
        raise InputError(f"{target} cannot be written ({e.strerror or e}); {what}") from e
    mode = stat.S_IMODE(work.stat().st_mode)
    try:
        with _in_one_sentence(target):
            yield work
            _sync(work)
            work.chmod(mode)  # safetensors makes files that only their owner can read
            work.replace(place)
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)


def _where(target: Path) -> Path:
    try:
        return _resolved(target)
    except (OSError, ValueError) as e:
        said = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{_short(target)} cannot be written ({said}); give a place that can.") from e


@contextlib.contextmanager
def _in_one_sentence(target: Path) -> Iterator[None]:
    """Errors of the file system, and safetensors' own, as one sentence."""
    try:
        yield
    except OSError as e:
        hint = "; free some space" if e.errno in FULL_DISK else ""
        raise PnpError(
            f"{target} could not be written ({e.strerror or e}); what was there before is untouched{hint}."
        ) from e
    except Exception as e:
        if type(e).__name__ != "SafetensorError":  # which is not an OSError, and is not imported for this
            raise
        raise PnpError(f"{target} could not be written ({e}); what was there before is untouched.") from e


def _sync(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_text(text: str, target: Path) -> None:
    """``write_bytes`` in UTF-8."""
    write_bytes(text.encode(), target)


def write_bytes(data: bytes, target: Path) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never half of one.

    A device or a pipe is written to directly.

    Raises:
        InputError: if the folder cannot be written to.
        PnpError: if writing fails midway; what was there before is untouched.
    """
    place = _where(target)
    if place.exists() and not place.is_file() and not place.is_dir():
        with _in_one_sentence(target), place.open("wb", buffering=0) as f:
            f.write(data)
        return
    with whole_file(target) as beside:
        beside.write_bytes(data)


def write_new(data: bytes, target: Path) -> None:
    """Write a file that does not exist yet, whole or not at all.

    Raises:
        FileExistsError: if it exists, even if another process made it a moment ago; it is untouched.
        PnpError: if it cannot be written.
    """
    try:
        work = temporary_beside(target)
        try:
            work.write_bytes(data)
            _sync(work)
            _link_new(work, target, data)
        finally:
            work.unlink(missing_ok=True)
    except FileExistsError:
        raise
    except OSError as e:
        raise PnpError(f"{target} cannot be written ({e.strerror or e}); {advice(e, 'choose another --out')}") from e


def _link_new(work: Path, target: Path, data: bytes) -> None:
    """Give ``work`` the name ``target``; unlike a rename, a hard link never replaces a file."""
    try:
        os.link(work, target)
    except FileExistsError:
        raise
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES, errno.EXDEV):
            raise
        with target.open("xb") as f:  # a file system without hard links
            try:
                f.write(data)
            except BaseException:
                target.unlink(missing_ok=True)
                raise


# ---------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def lock(folder: Path, timeout: float = 3600.0) -> Iterator[None]:
    """Exclusive right to write ``folder``; another process waits for it, with a note after a second.

    Raises:
        InputError: if no lock can be made beside ``folder``.
        PnpError: if another process has it for ``timeout`` seconds.
    """
    from filelock import FileLock, Timeout

    place = _where(folder)
    file = place.with_name(f".{_stem(place.name)}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o666))
        guard = FileLock(file)
        try:
            guard.acquire(timeout=min(_PATIENCE, timeout))
        except Timeout:
            warnings.warn(f"waiting for another process that is writing {folder}", stacklevel=3)
            guard.acquire(timeout=max(0.0, timeout - _PATIENCE))
    except Timeout:
        raise PnpError(
            f"another process has been writing {folder} for {timeout:.0f} s; wait for it or stop it"
        ) from None
    except OSError as e:
        raise InputError(f"{folder} cannot be written ({reason(e)}); {advice(e)}") from e
    try:
        yield
    finally:
        guard.release()


@contextlib.contextmanager
def whole_folder(folder: Path, removable: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A fresh folder beside ``folder`` that takes its place when the block ends well, and vanishes otherwise.

    Call it under ``lock(folder)``.  Leftovers of killed runs are removed.  Where ``folder`` is a link, what it leads
    to is replaced.

    Args:
        removable: called with the folder that was replaced before it is removed; what it raises puts everything back.
    """
    given, folder = folder, _where(folder)
    occupied = folder.is_dir() and any(folder.iterdir())
    remove_temporaries_of(folder)
    work = make_temporary_folder(folder)
    try:
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                _sync(path)

        def check(old: Path) -> None:
            if not occupied and any(old.iterdir()):
                raise PnpError(f"{given} was filled by another program and stays as it is; choose another --out")
            if removable is not None:
                removable(old)

        with deferred():
            _swap(work, folder, check)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _swap(work: Path, folder: Path, removable: Callable[[Path], None]) -> None:
    """Put ``work`` in the place of ``folder`` and remove what was there."""
    if not folder.exists():
        work.rename(folder)
        return
    if _exchange(work, folder):
        old = work
        restore: Callable[[], object] = lambda: _exchange(work, folder)  # noqa: E731
    else:
        old = make_temporary_folder(folder) / "old"
        folder.rename(old)
        restore = lambda: _put_back(old, folder, work)  # noqa: E731
        try:
            work.rename(folder)
        except BaseException:
            restore()
            raise
    try:
        removable(old)
    except BaseException:
        restore()
        raise
    shutil.rmtree(old if old == work else old.parent, ignore_errors=True)


def _put_back(old: Path, folder: Path, work: Path) -> None:
    if folder.exists():
        folder.rename(work)
    old.rename(folder)
    old.parent.rmdir()


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, so that a kill leaves the old or the new one; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux, since glibc 2.28
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

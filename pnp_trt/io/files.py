"""Write files and folders atomically, under a lock, and check output paths before the work begins.

Everything that the package writes goes through this module. A file or folder is first written beside its final path
under a temporary name, ``.NAME.partial-XXXXXXXX``, and then renamed. A killed process can leave such temporary files
behind, which :func:`is_temporary` recognises; everything else that it leaves is complete.

Symbolic links are followed: the link's target is written or replaced, and the link is kept.
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

#: bytes in the longest file name that common file systems accept
_LONGEST_NAME = 255
#: ``.NAME.partial-XXXXXXXX``, and the temporary names of earlier versions
_TEMPORARY = re.compile(
    r"\.(.+\.partial-[a-z0-9_]{8}|(run|states)\.json\.[a-z0-9_]{8}|(pictures|grid)\.png\.part)", re.DOTALL
)
#: seconds of waiting for another process before a warning is printed
_PATIENCE = 1.0


def is_temporary(name: str) -> bool:
    """Whether this is the name of a lock or of a killed process's temporary file, and never of a user's file."""
    return bool(_TEMPORARY.fullmatch(name)) or (name.startswith(".") and name.endswith(".lock"))


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed processes in ``folder``, to which only the caller may be writing."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def remove_temporaries_of(target: Path) -> None:
    """Remove the temporary files that killed writers of ``target`` left beside it; the caller holds its lock."""
    pattern = re.compile(re.escape(f".{_stem(target.name)}.partial-") + "[a-z0-9_]{8}")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            _remove(path)


def failure(folder: Path, error: OSError) -> str:
    """Return the error message for a folder that could not be completed."""
    hint = "free some space" if error.errno in FULL_DISK else "check the named file"
    return f"{folder} could not be made ({reason(error)}); nothing was written; {hint}, or choose another --out"


# ---------------------------------------------------------------------------------------------------------- checks


def check_writable_file(path: Path, option: str = "--out") -> None:
    """Refuse a path where no file can be written, before the work; test it with a temporary file in its folder.

    Args:
        option: the option that set the path, for the message.

    Raises:
        InputError: for a folder, a read-only file or folder, a path below a file, a loop of links, a name that is too
            long, a full disk, or any other error of the system.
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
    """Refuse a folder in which files cannot be written, before the work; it need not exist yet.

    Raises:
        InputError: as in :func:`check_writable_file`, and if ``path`` is a file.
    """
    with _refusing(path, option, "folder"):
        target = _resolved(path)
        if target.exists() and not target.is_dir():
            raise InputError(f"{option} {path} is a file; name a folder")
        _probe(target)


def check_replaceable_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that :func:`whole_folder` cannot replace, before the work.

    Raises:
        InputError: as in :func:`check_writable_folder`, and for the current folder, a folder above it, or a mount
            point.
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
        cause, hint = e.strerror or e, advice(e, f"name another {kind}")
        raise InputError(f"{option} {_short(path)} cannot be written ({cause}); {hint}") from e
    except ValueError as e:  # a zero byte
        raise InputError(f"{option} {_short(path)} cannot be written ({e}); name another {kind}") from e


def _guarded(target: Path) -> bool:
    """Whether ``target`` belongs to another user and its folder, such as /tmp, lets only owners replace files."""
    folder = target.parent.stat()
    users = (target.stat().st_uid, folder.st_uid)
    return bool(folder.st_mode & stat.S_ISVTX) and getattr(os, "geteuid", lambda: 0)() not in (0, *users)


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-100:]}"


def _resolved(path: Path) -> Path:
    """Resolve all links of a path, which need not exist.

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
    """Write and remove a temporary file in ``folder``, or in its nearest existing parent if it does not exist."""
    base = folder
    while not base.exists():
        base = base.parent
    if not base.is_dir():
        raise OSError(errno.ENOTDIR, f"{base} is a file")
    with tempfile.TemporaryFile(dir=base) as f:  # nameless if the system supports it, so that a kill leaves nothing
        f.write(bytes(4096))  # an empty file can be created even on a full disk
        f.flush()


# ----------------------------------------------------------------------------------------------------------- files


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; if ``folder`` is a link, create its target.

    Raises:
        InputError: if it cannot be created.
    """
    try:
        _resolved(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        cause = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"the folder {_short(folder)} cannot be created ({cause}); choose another --out") from e


def temporary_beside(target: Path) -> Path:
    """Create an empty file beside ``target``, with the user's usual permissions, and return its path."""
    while True:
        path = _temporary_name(target)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return path


def make_temporary_folder(target: Path) -> Path:
    """Create an empty folder beside ``target`` and return its path."""
    while True:
        path = _temporary_name(target)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{_stem(target.name)}.partial-{secrets.token_hex(4)}")


def _stem(name: str) -> str:
    """Return the name, shortened if it leaves no room for a prefix and a suffix."""
    if len(os.fsencode(name)) <= _LONGEST_NAME - 20:
        return name
    return f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces ``target`` if the block succeeds, and is removed otherwise.

    Raises:
        InputError: if the folder cannot be written to.
        PnpError: if writing fails midway; the previous file is untouched.
    """
    place = _where(target)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = temporary_beside(place)
    except OSError as e:
        hint = advice(e, "name another file.")
        raise InputError(f"{target} cannot be written ({e.strerror or e}); {hint}") from e
    mode = stat.S_IMODE(work.stat().st_mode)
    try:
        with _in_one_sentence(target):
            yield work
            _sync(work)
            work.chmod(mode)  # safetensors creates files that only their owner can read
            work.replace(place)
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)


def _where(target: Path) -> Path:
    try:
        return _resolved(target)
    except (OSError, ValueError) as e:
        cause = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{_short(target)} cannot be written ({cause}); name another file.") from e


@contextlib.contextmanager
def _in_one_sentence(target: Path) -> Iterator[None]:
    """Turn errors of the file system, and of safetensors, into a ``PnpError``."""
    try:
        yield
    except OSError as e:
        hint = "; free some space" if e.errno in FULL_DISK else ""
        raise PnpError(
            f"{target} could not be written ({e.strerror or e}); the previous file, if any, is untouched{hint}."
        ) from e
    except Exception as e:
        if type(e).__name__ != "SafetensorError":  # not an OSError; compared by name to avoid importing safetensors
            raise
        raise PnpError(f"{target} could not be written ({e}); the previous file, if any, is untouched.") from e


def _sync(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_text(text: str, target: Path) -> None:
    """Write a text in UTF-8; see :func:`write_bytes`."""
    write_bytes(text.encode(), target)


def write_bytes(data: bytes, target: Path) -> None:
    """Write a temporary file, fsync and rename it, so that a reader sees the old or the new file, never a part of one.

    A device or a pipe is written to directly.

    Raises:
        InputError: if the folder cannot be written to.
        PnpError: if writing fails midway; the previous file is untouched.
    """
    place = _where(target)
    if place.exists() and not place.is_file() and not place.is_dir():
        with _in_one_sentence(target), place.open("wb", buffering=0) as f:
            f.write(data)
        return
    with whole_file(target) as temporary:
        temporary.write_bytes(data)


def write_new(data: bytes, target: Path) -> None:
    """Write a file that does not exist yet, completely or not at all.

    Raises:
        FileExistsError: if it exists, even if another process has just created it; it is untouched.
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
    """Link ``work`` to ``target``; unlike a rename, a hard link never replaces an existing file."""
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
    """Lock ``folder`` for writing; if another process holds the lock, wait for it, with a warning after a second.

    Raises:
        InputError: if no lock can be created beside ``folder``.
        PnpError: if another process holds the lock for ``timeout`` seconds.
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
    """Yield a new folder beside ``folder``; it replaces ``folder`` if the block succeeds, and is removed otherwise.

    Call it under ``lock(folder)``.  Leftovers of killed runs are removed.  If ``folder`` is a link, its target is
    replaced.

    Args:
        removable: called with the old folder before it is removed; if it raises, the old folder is restored.
    """
    requested, folder = folder, _where(folder)
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
                raise PnpError(f"another program wrote to {requested}, which is left unchanged; choose another --out")
            if removable is not None:
                removable(old)

        with deferred():
            _swap(work, folder, check)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _swap(work: Path, folder: Path, removable: Callable[[Path], None]) -> None:
    """Replace ``folder`` with ``work`` and remove the old folder, unless ``removable`` raises."""
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
    """Swap two folders atomically, so that a kill leaves the old or the new one; False if that is not supported."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux, since glibc 2.28
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as possible, without raising errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

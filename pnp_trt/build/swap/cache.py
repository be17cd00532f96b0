"""Cache of bundles with LoRAs merged, which a server plugs on request.

A bundle's folder is named by a digest of the seal of the engine's manifest, every LoRA's hash and scale, and the
package's version.  It is created atomically.  A bundle that a process uses is locked and stays; of the others, the
least recently used are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...bundle.manifest import FILE as MANIFEST
from ...bundle.manifest import Manifest
from ...bundle.store import Bundle, cache_home, digest, lock, open_bundle, read_manifest
from ...errors import InputError, PnpError
from ...io.files import check_writable_folder, failure
from ...io.replacing import check_removable_bundle
from ...models.bases import is_hub_id
from ...version import __version__
from .lora import Lora
from .run import PlugSpec, check_engine, plug

#: largest number of bundles on disk; bundles in use are never removed
MAX_BUNDLES = 16
_NAME = re.compile(r"[0-9a-f]{40}")


def default_home() -> Path:
    """Default folder for plugged bundles: ``loras`` in the user's cache."""
    return cache_home() / "loras"


@dataclass(frozen=True)
class InUse:
    """A bundle that no process removes until :meth:`close`.

    Attributes:
        bundle: the bundle, with all files checked against its manifest.
    """

    bundle: Bundle
    _descriptor: int

    def close(self) -> None:
        """Allow the bundle to be removed; its networks must not be used afterwards."""
        os.close(self._descriptor)


@dataclass(frozen=True)
class PlugCache:
    """Plugged bundles in a folder.

    Attributes:
        home: the folder; created if it is missing.
        fetch_base: download an engine's base from the hub if it is not on this machine.
        max_bundles: largest number of bundles on disk; bundles in use are never removed.
    """

    home: Path
    fetch_base: bool = False
    max_bundles: int = MAX_BUNDLES

    def check(self, bundle: Bundle) -> None:
        """Raise ``InputError`` for a bundle that no LoRA can be merged into, or a folder that cannot be written."""
        manifest = bundle.manifest
        check_engine(manifest, bundle.folder)
        if is_hub_id(manifest.base.name) and not self.fetch_base:
            raise InputError(
                f"engine '{manifest.name}' names its base '{manifest.base.name}', which LoRAs need and "
                "which is not on this machine; add --fetch-base to download it from the hub"
            )
        check_writable_folder(self.home, "--lora-cache")

    def take(self, bundle: Bundle, loras: Sequence[tuple[Path, float]]) -> InUse:
        """Return the bundle with LoRAs merged; plug it with :func:`~pnp_trt.build.swap.run.plug` if it is not cached.

        Args:
            loras: .safetensors files and their scales, merged in this order.

        Raises:
            InputError, PnpError: as in ``plug``, or if the engine on disk is no longer ``bundle``.
        """
        texts = [f"{path}:{scale!r}" for path, scale in loras]
        key = digest([bundle.manifest.seal, [Lora.parse(text).identity() for text in texts], __version__])[:40]
        folder = self.home / key
        try:
            descriptor = _shared(folder)
        except OSError as e:
            raise PnpError(failure(folder, e)) from e
        try:
            plugged = _opened(folder)
            if plugged is None:
                with _making(folder):  # another process may be plugging it, or have just finished
                    plugged = _opened(folder) or self._make(bundle, texts, folder)
            with contextlib.suppress(OSError):  # it may belong to another user
                os.utime(folder / MANIFEST)
            self._prune()
        except BaseException:
            os.close(descriptor)
            raise
        return InUse(plugged, descriptor)

    def _make(self, bundle: Bundle, texts: Sequence[str], folder: Path) -> Bundle:
        if read_manifest(bundle.folder).seal != bundle.manifest.seal:
            raise InputError(f"engine '{bundle.name}' was replaced on disk after it was loaded; restart the server")
        plug(PlugSpec(str(bundle.folder.resolve()), self._base(bundle.manifest), tuple(texts), folder), force=True)
        return open_bundle(folder)

    def _base(self, manifest: Manifest) -> str | None:
        name = manifest.base.name
        return name if self.fetch_base and is_hub_id(name) else None

    def _prune(self) -> None:
        """Remove the least recently used bundles beyond ``max_bundles`` that no process uses."""
        ages = []
        for folder in sorted(self.home.iterdir()):
            if _NAME.fullmatch(folder.name):
                with contextlib.suppress(OSError):
                    ages.append(((folder / MANIFEST).stat().st_mtime_ns, folder))
        for _, folder in sorted(ages)[: max(0, len(ages) - self.max_bundles)]:
            with contextlib.suppress(OSError, PnpError), lock(folder, timeout=1), _alone(folder):
                check_removable_bundle(folder)
                shutil.rmtree(folder)


def _opened(folder: Path) -> Bundle | None:
    """The bundle in a folder; None if it is missing or damaged."""
    try:
        return open_bundle(folder)
    except InputError:
        return None


def _mark(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.use.lock")


def _shared(folder: Path) -> int:
    """Take a shared lock on a folder, which excludes :func:`_alone` until the returned descriptor is closed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(_mark(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _making(folder: Path) -> Iterator[None]:
    """Exclude other processes that create the same folder."""
    descriptor = os.open(folder.with_name(f".{folder.name}.make.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Exclude processes that use the folder; raise ``BlockingIOError`` if there is one."""
    descriptor = os.open(_mark(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

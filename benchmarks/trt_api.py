"""Every name of TensorRT, TensorRT-RTX and cuda-python in use, held against the real bindings of supported releases.

The names, and how many arguments they are called with, are read from the package's own source.  NVIDIA's bindings are
wheels of a megabyte, without the libraries; they import where a dozen C entry points are there, so that stubs of these
are compiled (gcc) and each release is imported in a process of its own.  No GPU is needed.

    make trt-api                                   # the releases below, downloaded into build/trt-api
    python -m benchmarks.trt_api --wheels FOLDER   # wheels that are there
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ROOT / "pnp_trt" / "backends"
#: distribution -> releases: the oldest that pyproject.toml allows, and the last of each minor one since
RELEASES = {
    "tensorrt-cu13-bindings": (
        "10.15.1.29", "10.16.1.11", "11.0.0.114", "11.1.0.106", "11.2.1.2", "11.3.0.99", "11.4.0.106",
    ),
    "tensorrt-rtx-cu13-bindings": ("1.5.0.114", "1.6.1.120", "1.7.1.116"),
    "cuda-bindings": ("12.9.10", "13.4.4", "13.5.0"),
}  # fmt: skip
#: what speaks to TensorRT
FILES = ("compile.py", "facts.py", "flavour.py", "logger.py", "network.py", "refit.py")
#: what a variable or attribute holds, by its name
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "_runtime": "Runtime", "engine": "ICudaEngine",
    "_engine": "ICudaEngine", "context": "IExecutionContext", "_context": "IExecutionContext", "layer": "ILayer",
    "refitter": "Refitter", "kernels": "IRuntimeCache",
}  # fmt: skip
#: where it is another one: (file, function) -> variable -> class
ELSEWHERE = {
    ("refit.py", "refit_network"): {"parser": "OnnxParserRefitter", "config": "ISerializationConfig"},
    ("flavour.py", "context"): {"config": "IRuntimeConfig"},
    ("facts.py", "_words"): {"layer": ""},  # the inspector's JSON
    ("compile.py", "_timing_cache"): {"cache": "ITimingCache"},
}
#: what a call or an attribute gives
GIVES = {
    "get_error": "ParserError", "get_timing_cache": "ITimingCache", "create_engine_inspector": "EngineInspector",
    "attention": "IAttention", "get_input": "ITensor",
}  # fmt: skip
#: what a layer becomes once its class was set
ATTENTION = {"ILayer.attention": "IAttentionInputLayer.attention"}
#: names that one of the two has alone, which the source asks about first
RTX_ALONE = re.compile(
    r"ComputeCapability|EngineValidity|EngineInvalidity|IRuntimeC|ICudaEngine\.create_runtime_config|get_engine_validity|"
    r"compute_capabilit|DynamicShapesKernel|is_stream_capturable|REQUIRE_USER_ALLOCATION"
)
TENSORRT_ALONE = re.compile(r"HardwareCompatibilityLevel|hardware_compatibility_level|[Tt]iming_?[Cc]ache")
_STUBS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion",
)  # fmt: skip
_LIBRARIES = (
    *(f"lib{name}.so.{major}" for major in (10, 11) for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin")),
    "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1",
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Use:
    """A name in use: ``Class.member``, a name of the module, or a function of cuda-python.

    Attributes:
        arguments: that it is called with, without self; −1 where it is not called, or with a number that varies.
        place: file and line.
    """

    name: str
    arguments: int
    place: str


def uses() -> tuple[list[Use], list[Use]]:
    """The names in use of TensorRT, and of cuda-python (``runtime.cudaMalloc``, ``driver.cuLaunchKernel``)."""
    found: list[Use] = []
    for file in FILES:
        path = BACKENDS / "tensorrt" / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function, node in _inside(tree):
            if isinstance(node, ast.Attribute) and (name := _tensorrt(node, path.name, function)):
                found.append(Use(name, -1, f"{path.name}:{node.lineno}"))
            if isinstance(node, ast.Call) and (name := _tensorrt(node.func, path.name, function)):
                found.append(Use(name, _count(node), f"{path.name}:{node.lineno}"))
    cuda: list[Use] = []
    path = BACKENDS / "cuda.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        place = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and (chain := _chain(node)) and chain[0] in ("_rt", "runtime", "driver"):
            side = "driver" if chain[0] == "driver" else "runtime"
            cuda.append(Use(".".join((side, *chain[1:])), -1, place))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            side = {"call": "runtime", "_driver": "driver"}.get(node.func.attr)
            if side and isinstance(node.args[0], ast.Constant):
                varies = any(isinstance(a, ast.Starred) for a in node.args)
                cuda.append(Use(f"{side}.{node.args[0].value}", -1 if varies else len(node.args) - 1, place))
    return sorted(set(found)), sorted(set(cuda))


def _inside(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the function that it is in."""
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else function
        yield name, node
        yield from _inside(node, name)


def _count(call: ast.Call) -> int:
    if any(isinstance(a, ast.Starred) for a in call.args) or call.keywords:
        return -1
    return len(call.args)


def _chain(node: ast.AST) -> list[str]:
    """``self._rt.a.b`` as ``[_rt, a, b]``; empty for what is no chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return []
    return ([] if node.id == "self" else [node.id]) + parts[::-1]


def _tensorrt(node: ast.AST, file: str, function: str) -> str | None:
    """The name in TensorRT that an expression is; None where it is of something else."""
    if not isinstance(node, ast.Attribute) or (node.attr.startswith("__") and node.attr != "__members__"):
        return None
    held = node.value
    if isinstance(held, ast.Call) and isinstance(held.func, ast.Attribute):
        if held.func.attr == "load":  # the module itself
            return node.attr
        owner = GIVES.get(held.func.attr)
        return f"{owner}.{node.attr}" if owner else None
    chain = _chain(node)
    if chain and chain[0] in ("trt", "_trt"):
        return ".".join(chain[1:])
    if isinstance(held, ast.Attribute) and held.attr in GIVES:
        return f"{GIVES[held.attr]}.{node.attr}"
    if len(chain) != 2:
        return None
    owner = (CLASSES | ELSEWHERE.get((file, function), {})).get(chain[0])
    name = f"{owner}.{chain[1]}"
    return ATTENTION.get(name, name) if owner else None


def documented(module: Any, name: str) -> str | None:
    """What a binding's docstring says of a name, its constructor's for a class; None where it has no such name."""
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    if inspect.isclass(found):
        found = found.__init__  # type: ignore[misc]
    return str(getattr(found, "__doc__", None) or "")


def accepted(doc: str) -> list[tuple[int, int]]:
    """Fewest and most arguments, without self, of each signature in pybind11's docstring; empty where it has none."""
    found = []
    for line in doc.splitlines():
        if (match := re.match(r"(?:\d+\. )?\w+\((.*)\) ->", line.strip())) is None:
            continue
        arguments = [a for a in _split(match[1]) if a and not re.match(r"self\b", a)]
        if any(a.startswith("*") for a in arguments):
            continue
        found.append((sum("=" not in a for a in arguments), len(arguments)))
    return found


def _split(text: str) -> list[str]:
    """Arguments of a signature, at the commas outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def wrong(wanted: list[Use], docs: dict[str, str | None], rtx: bool) -> list[str]:
    """What a release does not have, or takes other arguments for, one line each."""
    other = TENSORRT_ALONE if rtx else RTX_ALONE
    said = []
    for use in wanted:
        if other.search(use.name):
            continue
        if (doc := docs.get(use.name)) is None:
            said.append(f"{use.place}: {use.name} is not there")
            continue
        ranges = accepted(doc)
        if use.arguments >= 0 and ranges and not any(low <= use.arguments <= high for low, high in ranges):
            takes = " or ".join(f"{low} to {high}" for low, high in ranges)
            said.append(f"{use.place}: {use.name} is called with {use.arguments} arguments and takes {takes}")
    return said


def wrong_cuda(wanted: list[Use], modules: dict[str, Any]) -> list[str]:
    """As :func:`wrong`, of ``cuda.bindings.runtime`` and ``driver``."""
    said = []
    for use in wanted:
        side, *parts = use.name.split(".")
        found = modules[side]
        for part in parts:
            found = getattr(found, part, None)
        if found is None:
            said.append(f"{use.place}: {use.name} is not there")
        elif use.arguments >= 0:
            try:
                inspect.signature(found).bind(*[None] * use.arguments)
            except TypeError:
                said.append(f"{use.place}: {use.name}{inspect.signature(found)} is called with {use.arguments}")
            except ValueError:  # it tells of no signature
                continue
    return said


def stubs(folder: Path) -> None:
    """Compile the libraries that the bindings load; none of their functions is ever called."""
    (folder / "stubs.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in _STUBS))
    for library in _LIBRARIES:
        words = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run([*words, str(folder / "stubs.c")], check=True)


def check_wheel(wheel: Path, folder: Path) -> list[str]:
    """What is wrong with a release; imported by :func:`child` in a process of its own."""
    at = folder / wheel.stem
    with zipfile.ZipFile(wheel) as held:
        held.extractall(at)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.trt_api", "--child", str(at)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    if done.returncode:
        return [f"it cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    said: list[str] = json.loads(done.stdout.splitlines()[-1])
    return said


def child(folder: Path) -> list[str]:
    """Import the extracted wheel and check it."""
    tensorrt, cuda = uses()
    if (folder / "cuda").is_dir():
        import cuda as namespace

        namespace.__path__ = [str(folder / "cuda"), *namespace.__path__]
        from cuda.bindings import driver, runtime

        assert str(folder) in str(runtime.__file__)
        return wrong_cuda(cuda, {"driver": driver, "runtime": runtime})
    (library,) = folder.rglob("tensorrt*.so")
    spec = importlib.util.spec_from_file_location(library.name.split(".")[0], library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = (next(folder.rglob("__init__.py"))).read_text(encoding="utf-8", errors="replace")
    docs = {use.name: documented(module, use.name) for use in tensorrt}
    # what the package itself adds to the extension module, which cannot be imported without the libraries
    docs |= {name: "" for name in docs if docs[name] is None and re.search(rf"^def {name}\(", package, re.MULTILINE)}
    return wrong(tensorrt, docs, "rtx" in library.name)


def download(folder: Path) -> list[Path]:
    """The wheels of ``RELEASES``; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, versions in RELEASES.items():
        for version in versions:
            if not list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
                words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
                subprocess.run([*words, f"{name}=={version}"], check=True)
    return sorted(folder.glob("*.whl"))


def main() -> None:
    """Check, print, and exit with 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, in place of downloading them")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(child(given.child)))
        return
    wheels = download(ROOT / "build" / "trt-api") if given.wheels is None else sorted(given.wheels.glob("*.whl"))
    tensorrt, cuda = uses()
    print(f"{len({u.name for u in tensorrt})} names of TensorRT and {len({u.name for u in cuda})} of cuda-python")
    failed = not wheels
    with tempfile.TemporaryDirectory() as temporary:
        stubs(Path(temporary))
        for wheel in wheels:
            said = check_wheel(wheel, Path(temporary))
            failed |= bool(said)
            print(f"{'-'.join(wheel.name.split('-')[:2])}: {'all there' if not said else ''}")
            print("".join(f"  {line}\n" for line in said), end="")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

"""Check every name of TensorRT, TensorRT-RTX and cuda-python that is used against the bindings of supported releases.

The names, and the numbers of arguments they are called with, are read from the package's source.  NVIDIA's bindings
are wheels of a megabyte without the libraries.  They can be imported if about a dozen C entry points exist, so stubs
of these are compiled with gcc, and each release is imported in a separate process.  No GPU is needed.

    make trt-api                                   # the releases below, downloaded into build/trt-api
    python -m benchmarks.trt_api --wheels FOLDER   # wheels downloaded before
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
#: distribution -> releases: the oldest that pyproject.toml allows, and the last of each later minor version
RELEASES = {
    "tensorrt-cu13-bindings": (
        "10.15.1.29", "10.16.1.11", "11.0.0.114", "11.1.0.106", "11.2.1.2", "11.3.0.99", "11.4.0.106",
    ),
    "tensorrt-rtx-cu13-bindings": ("1.5.0.114", "1.6.1.120", "1.7.1.116"),
    "cuda-bindings": ("12.9.10", "13.4.4", "13.5.0"),
}  # fmt: skip
#: modules that call TensorRT
FILES = ("compile.py", "facts.py", "flavour.py", "logger.py", "network.py", "refit.py")
#: name of a variable or attribute -> its class
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "_runtime": "Runtime", "engine": "ICudaEngine",
    "_engine": "ICudaEngine", "context": "IExecutionContext", "_context": "IExecutionContext", "layer": "ILayer",
    "refitter": "Refitter", "kernels": "IRuntimeCache",
}  # fmt: skip
#: exceptions: (file, function) -> variable -> class
ELSEWHERE = {
    ("refit.py", "refit_network"): {"parser": "OnnxParserRefitter", "config": "ISerializationConfig"},
    ("flavour.py", "context"): {"config": "IRuntimeConfig"},
    ("facts.py", "_words"): {"layer": ""},  # the inspector's JSON
    ("compile.py", "_timing_cache"): {"cache": "ITimingCache"},
}
#: name of a method or attribute -> class of its value
GIVES = {
    "get_error": "ParserError", "get_timing_cache": "ITimingCache", "create_engine_inspector": "EngineInspector",
    "attention": "IAttention", "get_input": "ITensor",
}  # fmt: skip
#: names after a layer's class was set
ATTENTION = {"ILayer.attention": "IAttentionInputLayer.attention"}
#: names that exist in only one of the two packages; the source checks for them before use
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
    """A use of ``Class.member``, of a module-level name, or of a function of cuda-python.

    Attributes:
        arguments: number of arguments without self; −1 if it is not called, or the number varies.
        place: file and line.
    """

    name: str
    arguments: int
    place: str


def uses() -> tuple[list[Use], list[Use]]:
    """Uses of TensorRT, and of cuda-python (``runtime.cudaMalloc``, ``driver.cuLaunchKernel``)."""
    tensorrt: list[Use] = []
    for file in FILES:
        path = BACKENDS / "tensorrt" / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function, node in _inside(tree):
            if isinstance(node, ast.Attribute) and (name := _tensorrt(node, path.name, function)):
                tensorrt.append(Use(name, -1, f"{path.name}:{node.lineno}"))
            if isinstance(node, ast.Call) and (name := _tensorrt(node.func, path.name, function)):
                tensorrt.append(Use(name, _count(node), f"{path.name}:{node.lineno}"))
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
    return sorted(set(tensorrt)), sorted(set(cuda))


def _inside(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the enclosing function."""
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else function
        yield name, node
        yield from _inside(node, name)


def _count(call: ast.Call) -> int:
    if any(isinstance(a, ast.Starred) for a in call.args) or call.keywords:
        return -1
    return len(call.args)


def _chain(node: ast.AST) -> list[str]:
    """``self._rt.a.b`` as ``[_rt, a, b]``; empty if it is not a chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return []
    return ([] if node.id == "self" else [node.id]) + parts[::-1]


def _tensorrt(node: ast.AST, file: str, function: str) -> str | None:
    """Return the TensorRT name that an expression refers to, or None."""
    if not isinstance(node, ast.Attribute) or (node.attr.startswith("__") and node.attr != "__members__"):
        return None
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr == "load":  # the module itself
            return node.attr
        owner = GIVES.get(value.func.attr)
        return f"{owner}.{node.attr}" if owner else None
    chain = _chain(node)
    if chain and chain[0] in ("trt", "_trt"):
        return ".".join(chain[1:])
    if isinstance(value, ast.Attribute) and value.attr in GIVES:
        return f"{GIVES[value.attr]}.{node.attr}"
    if len(chain) != 2:
        return None
    owner = (CLASSES | ELSEWHERE.get((file, function), {})).get(chain[0])
    name = f"{owner}.{chain[1]}"
    return ATTENTION.get(name, name) if owner else None


def documented(module: Any, name: str) -> str | None:
    """Return the docstring of a name in a binding (of the constructor for a class), or None if the name is missing."""
    member = module
    for part in name.split("."):
        member = getattr(member, part, None)
        if member is None:
            return None
    if inspect.isclass(member):
        member = member.__init__  # type: ignore[misc]
    return str(getattr(member, "__doc__", None) or "")


def accepted(doc: str) -> list[tuple[int, int]]:
    """Fewest and most arguments, without self, of each signature in pybind11's docstring; empty without signatures."""
    ranges = []
    for line in doc.splitlines():
        if (match := re.match(r"(?:\d+\. )?\w+\((.*)\) ->", line.strip())) is None:
            continue
        arguments = [a for a in _split(match[1]) if a and not re.match(r"self\b", a)]
        if any(a.startswith("*") for a in arguments):
            continue
        ranges.append((sum("=" not in a for a in arguments), len(arguments)))
    return ranges


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


def wrong(expected: list[Use], docs: dict[str, str | None], rtx: bool) -> list[str]:
    """One line for each name that a release lacks or that takes a different number of arguments."""
    other = TENSORRT_ALONE if rtx else RTX_ALONE
    problems = []
    for use in expected:
        if other.search(use.name):
            continue
        if (doc := docs.get(use.name)) is None:
            problems.append(f"{use.place}: {use.name} is missing")
            continue
        ranges = accepted(doc)
        if use.arguments >= 0 and ranges and not any(low <= use.arguments <= high for low, high in ranges):
            takes = " or ".join(f"{low} to {high}" for low, high in ranges)
            problems.append(f"{use.place}: {use.name} is called with {use.arguments} arguments and takes {takes}")
    return problems


def wrong_cuda(expected: list[Use], modules: dict[str, Any]) -> list[str]:
    """Same as :func:`wrong`, for ``cuda.bindings.runtime`` and ``driver``."""
    problems = []
    for use in expected:
        side, *parts = use.name.split(".")
        member = modules[side]
        for part in parts:
            member = getattr(member, part, None)
        if member is None:
            problems.append(f"{use.place}: {use.name} is missing")
        elif use.arguments >= 0:
            try:
                inspect.signature(member).bind(*[None] * use.arguments)
            except TypeError:
                problems.append(f"{use.place}: {use.name}{inspect.signature(member)} is called with {use.arguments}")
            except ValueError:  # it has no signature
                continue
    return problems


def stubs(folder: Path) -> None:
    """Compile stubs of the libraries that the bindings load; their functions are never called."""
    (folder / "stubs.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in _STUBS))
    for library in _LIBRARIES:
        words = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run([*words, str(folder / "stubs.c")], check=True)


def check_wheel(wheel: Path, folder: Path) -> list[str]:
    """Problems of a release, which :func:`child` imports in a separate process."""
    at = folder / wheel.stem
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(at)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.trt_api", "--child", str(at)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    if done.returncode:
        return [f"it cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    problems: list[str] = json.loads(done.stdout.splitlines()[-1])
    return problems


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
    # functions that the Python package defines itself; without the libraries it cannot be imported
    docs |= {name: "" for name in docs if docs[name] is None and re.search(rf"^def {name}\(", package, re.MULTILINE)}
    return wrong(tensorrt, docs, "rtx" in library.name)


def download(folder: Path) -> list[Path]:
    """Paths of the wheels of ``RELEASES``; only missing ones are downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, versions in RELEASES.items():
        for version in versions:
            if not list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
                words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
                subprocess.run([*words, f"{name}=={version}"], check=True)
    return sorted(folder.glob("*.whl"))


def main() -> None:
    """Check, print, and exit with 1 if there are problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use instead of downloading them")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(child(options.child)))
        return
    wheels = download(ROOT / "build" / "trt-api") if options.wheels is None else sorted(options.wheels.glob("*.whl"))
    tensorrt, cuda = uses()
    print(f"{len({u.name for u in tensorrt})} names of TensorRT and {len({u.name for u in cuda})} of cuda-python")
    failed = not wheels
    with tempfile.TemporaryDirectory() as temporary:
        stubs(Path(temporary))
        for wheel in wheels:
            problems = check_wheel(wheel, Path(temporary))
            failed |= bool(problems)
            print(f"{'-'.join(wheel.name.split('-')[:2])}: {'no problems' if not problems else ''}")
            print("".join(f"  {line}\n" for line in problems), end="")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

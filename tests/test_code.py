"""Limits on the code: the length of functions, the size of the wheel, and the folders of tests."""

from __future__ import annotations

import ast
import statistics
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = Path(__file__).parents[1] / "pnp_trt"
#: lines of a function's body; a longer one needs a sentence ``Long: …`` in its docstring
MOST = 60
#: folders of tests for code outside the package, or for all of it: benchmarks, hostile inputs, examples of extensions
ELSEWHERE = {"benchmarks", "campaign", "extending"}
#: bytes: PyPI accepts files of up to 100 MB; the code alone must stay below 2 MB
WHEEL, CODE = 80e6, 2e6


def functions(source: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield the name, lines, lines of the body without docstring, and docstring of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            body = node.body[1:] if text else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1, lines, text


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_long_functions_state_why() -> None:
    long = {
        f"{path.relative_to(PACKAGE)}: {name} has {lines} lines": "Long: " in text
        for path in modules()
        for name, _, lines, text in functions(path.read_text(encoding="utf-8"))
        if lines > MOST
    }
    assert [where for where, stated in long.items() if not stated] == []


def test_functions_are_short() -> None:
    lengths = [lines for path in modules() for _, lines, _, _ in functions(path.read_text(encoding="utf-8"))]
    assert statistics.median(lengths) <= 8


def test_lengths_are_counted_without_the_docstring() -> None:
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    b = a\n    return b\n\n\ndef g(): ...\n'
    assert list(functions(source)) == [("f", 9, 2, "One.\n\nTwo."), ("g", 1, 1, "")]


def test_folders_of_tests_match_those_of_the_package() -> None:
    here = Path(__file__).parent
    folders = {path.parent.relative_to(here) for path in here.rglob("test_*.py")} - {Path()}
    assert [f for f in sorted(folders) if f.parts[0] not in ELSEWHERE and not (PACKAGE / f).is_dir()] == []


def test_the_wheel_is_small() -> None:
    """Code counts compressed, as in a wheel; assets are mostly weights, which hardly compress, and count in full."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assets = sum(path.stat().st_size for path in files if path.is_relative_to(PACKAGE / "assets"))
    code = [path.read_bytes() for path in files if not path.is_relative_to(PACKAGE / "assets")]
    compressed = sum(len(zlib.compress(data)) for data in code)
    assert compressed < CODE and sum(map(len, code)) > compressed
    assert compressed + assets < WHEEL


def test_pytest_ignores_no_folder_of_tests(request: pytest.FixtureRequest) -> None:
    """By default pytest silently ignores folders with some names, among them ``build``."""
    patterns = request.config.getini("norecursedirs")
    folders = {f.parent for f in TESTS.rglob("test_*.py")}
    names = {part for f in folders for part in f.relative_to(TESTS).parts}
    assert "build" in names and not [n for n in names for p in patterns if fnmatch(n, p)]

"""The pages on extending match the example files and the registries; each example is one file and one entry point."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from pnp_trt.sampling.schedules import SCHEDULES

from .conftest import EXAMPLES, ROOT, entry_points

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"<!-- (\S+) -->\n```python\n(.*?)```\n", re.DOTALL)
POINTS = [(group, name, value) for group, points in entry_points().items() for name, value in points.items()]


def test_the_page_shows_the_example_files() -> None:
    shown = {Path(file).name: code for file, code in _BLOCK.findall(PAGE)}
    assert shown == {file.name: file.read_text(encoding="utf-8") for file in EXAMPLES.glob("*.py")}


def test_sections_are_short() -> None:
    for section in PAGE.split("\n## ")[1:]:
        title, lines = section.splitlines()[0], section.count("\n")
        assert lines <= (100 if title in ("A backend", "A base-model family") else 60), title


@pytest.mark.parametrize(("group", "name", "value"), POINTS)
def test_an_extension_is_one_file_and_one_entry_point(group: str, name: str, value: str) -> None:
    """An extension takes one module and one line in pyproject.toml, and no change in pnp-trt."""
    module, _, attribute = value.partition(":")
    assert re.search(rf"^(class|def) {attribute}\b|^{attribute} = ", (EXAMPLES / f"{module}.py").read_text(), re.M)
    others = [*EXAMPLES.glob("*.py"), *(ROOT / "pnp_trt").rglob("*.py")]
    naming = [path for path in others if re.search(rf"[\"']{re.escape(name)}[\"']", path.read_text(encoding="utf-8"))]
    assert [path.name for path in naming] in ([f"{module}.py"], [])
    lines = (EXAMPLES / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert sum(value in line for line in lines) == 1
    assert module in tomllib.loads("\n".join(lines))["tool"]["setuptools"]["py-modules"]
    assert f"`{group}`" in PAGE


def test_the_table_of_schedules_matches_the_registry() -> None:
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (?:`([^`]+)`)? ?\|$", page, re.M)
    builtin = [rule for rule in SCHEDULES.values() if rule.table.__module__.startswith("pnp_trt.")]
    expected = [(rule.name, rule.description, rule.diffusers_class or "") for rule in builtin]
    assert [row for row in rows if row[0] != "teacher"] == expected

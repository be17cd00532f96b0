"""The pages in the documentation site's navigation and the objects in its reference exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
#: written by docs/site_hooks.py
GENERATED = {"reference/cli.md", "contributing.md", "changelog.md", "model-card.md"}


def pages(nav: Any) -> Iterator[str]:
    """Yield the files in a navigation."""
    if isinstance(nav, str):
        yield nav
    for each in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from pages(each)


def test_every_page_of_the_navigation_exists() -> None:
    yaml = pytest.importorskip("yaml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = list(pages(nav))
    assert len(named) == len(set(named)) > 20
    assert [page for page in named if page not in GENERATED and not (ROOT / "docs" / page).is_file()] == []
    hooks = (ROOT / "docs/site_hooks.py").read_text(encoding="utf-8")
    assert [page for page in GENERATED if f'"{page}"' not in hooks] == []


def definitions(dotted: str) -> set[str] | None:
    """Return the functions and classes that a module defines, or None if the module does not exist."""
    path = ROOT.joinpath(*dotted.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("page", sorted((ROOT / "docs/reference").glob("*.md")), ids=lambda page: page.stem)
def test_objects_in_the_reference_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    references = re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", text, re.MULTILINE)
    assert references
    for dotted, members in references:
        module, _, name = dotted.rpartition(".")
        names = definitions(dotted)
        if names is None:  # a class or a function of a module
            assert name in (definitions(module) or ()), dotted
        assert {member.strip() for member in members.split(",") if member} <= (names or set()), dotted


def test_links_out_of_the_docs_lead_to_files() -> None:
    """The site's hooks copy linked files and cannot copy a folder."""
    links = {
        (page.name, target)
        for page in (ROOT / "docs").rglob("*.md")
        for target in re.findall(r"\]\(((?:\.\./)+[^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).resolve().is_relative_to(ROOT / "docs")
    }
    assert links
    assert [link for link in links if not (ROOT / link[1].lstrip("./")).is_file()] == []

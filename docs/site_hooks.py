"""Hooks of the documentation site (mkdocs.yml): pages and files of the repository that are not in docs/.

- ``contributing.md``, ``changelog.md`` and ``model-card.md`` are copies of files of the repository;
- ``reference/cli.md`` is generated from the commands' help;
- files that a page links to outside docs/ are copied into the site, so that every link works offline.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: page of the site -> file of the repository
PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "model-card.md": "pnp_trt/assets/emoji/README.md",
}
#: a link to a file outside docs/, from a page directly in docs/
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the linked files of the repository."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "grid.png", abs_src_path=str(ROOT / "pnp_trt/assets/emoji/grid.png")))
    files.append(File.generated(config, "reference/cli.md", content=commands()))
    linked = {target for page in (ROOT / "docs").glob("*.md") for target in _OUTSIDE.findall(page.read_text("utf-8"))}
    for target in sorted(linked):
        files.append(File.generated(config, f"repository/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to files outside docs/ to the copies."""
    return _OUTSIDE.sub(r"](repository/\1)", markdown)


def commands() -> str:
    """The command line as Markdown: a section and a table of options for each command."""
    import typer

    from pnp_trt.cli.app import app

    lines = ["# Command line", "", "Every command also prints this with `--help`.", ""]
    pending = [("pnp-trt", typer.main.get_command(app))]
    while pending:
        name, command = pending.pop(0)
        below = getattr(command, "commands", {})
        pending = [(f"{name} {each}", command) for each, command in below.items()] + pending
        if below and name != "pnp-trt":
            continue
        lines += [f"## {name}", "", command.help or "", ""]
        rows = [row for parameter in command.params if (row := _row(parameter))]
        if rows:
            lines += ["| option | default | meaning |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str | None:
    """Return a parameter as a table row, or None for typer's own parameters."""
    if "completion" in parameter.name:
        return None
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    default = parameter.default
    shown = "" if default in (None, False, ()) or callable(default) or default is ... else f"`{default}`"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| {', '.join(f'`{each}`' for each in names)} | {shown if 'UNSET' not in shown.upper() else ''} | {text} |"

"""The README's tables against the recorded results, and the command that writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_tables
from pnp_trt.bench import results
from pnp_trt.errors import InputError

from ..bench import fake_document

README = (readme_tables.ROOT / "README.md").read_text(encoding="utf-8")


def region(text: str, name: str) -> str:
    match = re.search(rf"<!-- bench:{name} -->\n.*?<!-- /bench -->", text, re.DOTALL)
    assert match, f"the README has no region {name}"
    return match[0]


@pytest.mark.parametrize("name", [match["name"] for match in readme_tables._REGION.finditer(README)])
def test_the_readme_equals_the_records(name: str) -> None:
    table = region(README, name)
    assert readme_tables.fill(table, readme_tables.read_record) == table


def test_the_readme_has_its_regions() -> None:
    names = [match["name"] for match in readme_tables._REGION.finditer(README)]
    assert {"cost", "latency"} <= set(names) <= set(readme_tables.TABLES)
    assert {"guides", "kid"} & set(names)


def test_tables_of_a_document() -> None:
    doc = fake_document.make()
    assert readme_tables.cost(doc).splitlines()[2:] == [
        "| teacher | 859.521 | 401.64 | 338.61 |",
        "| guide-tiny | 1.377 | 7.90 | 7.50 |",
        "| guide-full | 361.279 | 137.90 | 116.42 |",
    ]
    lines = readme_tables.latency(doc).splitlines()
    assert lines[0] == "| method | NFE | batch 1 | batch 4 | batch 8 |"
    assert lines[2].startswith("| teacher, CFG | 40 | 413 | 310 | 303 |")
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:11]]
    assert names[3] == "teacher, CFG, half the steps"
    assert names[5:7] == ["teacher + guide (emoji-tiny)", "teacher + guide (emoji-tiny-fp16-rtx-sm_89)"]
    assert re.search(r"\| 222 · 0\.53 \[0\.52, 0\.53\] \|", lines[7])
    assert "per image of 20 steps" in " ".join(lines)
    kid = readme_tables.kid(doc).splitlines()
    assert kid[0] == "| | 50 steps | 25 steps | 20 steps | 10 steps | 8 steps | 4 steps |"
    assert "| teacher + guide | 0.104 [0.098, 0.110] | | 0.108 [0.102, 0.115] | | 0.120 [0.114, 0.127] | |" in kid


def test_filling_regions_again_changes_nothing() -> None:
    doc = fake_document.make()
    text = "before\n<!-- bench:cost -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:kid -->\n<!-- /bench -->\nafter\n"
    files: list[str] = []

    def read(file: str) -> dict[str, Any]:
        files.append(file)
        return doc

    filled = readme_tables.fill(text, read)
    assert files == ["cost-emoji.json", "emoji-bench.json"]
    assert filled.startswith("before\n<!-- bench:cost -->\n| network |")
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert readme_tables.fill(filled, read) == filled
    assert readme_tables.fill("no region", read) == "no region"


def test_wrong_regions_are_refused() -> None:
    with pytest.raises(InputError, match="unknown region 'bench:speed'; available: cost, latency"):
        readme_tables.fill("<!-- bench:speed -->\n<!-- /bench -->", lambda file: {})
    with pytest.raises(InputError, match="not closed"):
        readme_tables.fill("<!-- bench:cost -->\n| a |", lambda file: {})


def test_a_document_without_the_measurement_is_refused() -> None:
    doc = fake_document.make(quality=False, latency=[])
    with pytest.raises(InputError, match="no timed CFG"):
        readme_tables.latency(doc)
    with pytest.raises(InputError, match="no KID at w = 3"):
        readme_tables.kid(doc)


def test_the_command_fills_and_checks_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:cost -->\n<!-- /bench -->\n")
    results.write(fake_document.make(), tmp_path / "cost-emoji.json")
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert readme.read_text() == "<!-- bench:cost -->\n<!-- /bench -->\n"
    assert readme_tables.main(arguments) == 0
    assert "| guide-tiny | 1.377 |" in readme.read_text()
    assert readme_tables.main([*arguments, "--check"]) == 0
    (tmp_path / "cost-emoji.json").write_text('{"schema": "pnp-trt/bench/1"}')
    assert readme_tables.main(arguments) == 2
    assert "make a new one" in capsys.readouterr().err

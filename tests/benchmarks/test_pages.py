"""Pages that benchmarks write from committed records: each equals what its command writes from them today."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite_pytorch")

from benchmarks.emoji import deepcache, free_report, gains, step_lora  # noqa: E402  (need torch)
from benchmarks.emoji.rivals import __main__ as rivals  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
PAGES: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "deepcache.md": (deepcache.main, ["report"]),
    "gain.md": (gains.main, ["report"]),
    "joint-parts.md": (rivals.main, ["report", "--joint"]),
    "no-training.md": (free_report.main, []),
    "rivals.md": (rivals.main, ["report"]),
    "step-lora.md": (step_lora.main, ["report"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_equals_its_record(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    write, arguments = PAGES[name]
    write([*arguments, "--document", str(tmp_path / name)])
    assert (tmp_path / name).read_text() == (REPOSITORY / "docs" / name).read_text()

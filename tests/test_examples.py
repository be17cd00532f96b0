"""Run each example as its docstring states; tests/extending tests those of examples/extending."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"sample_from_python", "diffusers_pipeline", "distil_your_model"}


def test_sample_from_python(micro_bundles: Path, tmp_path: Path) -> None:
    assert run("sample_from_python", micro_bundles / "guided", tmp_path) == "a red apple w = 3.0\na panda w = 5.0\n"
    with Image.open(tmp_path / "0.png") as one, Image.open(tmp_path / "1.png") as other:
        assert one.size == other.size and one.tobytes() != other.tobytes()


def test_diffusers_pipeline(micro_base: Path, micro_guide: Path, tmp_path: Path) -> None:
    out = run("diffusers_pipeline", micro_base, micro_guide, tmp_path / "image.png")
    assert out.splitlines() == ["CFG: 16 evaluations of the U-Net", "guided: 8 evaluations of the U-Net"]
    assert (tmp_path / "image.png").is_file()


@pytest.mark.slow
def test_distil_your_model(micro_base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red apple\na tree\n")
    out = run("distil_your_model", micro_base, tmp_path / "prompts.txt", tmp_path)
    assert out.startswith("relative error on held-out states: 0.")
    assert (tmp_path / "bundle" / "manifest.json").is_file()

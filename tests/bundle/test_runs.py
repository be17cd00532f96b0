"""A run can be resumed although a killed process left temporary files in its folder."""

from __future__ import annotations

from pathlib import Path

from pnp_trt.bundle.runs import claim
from pnp_trt.io.files import make_temporary_folder, temporary_beside


def test_a_run_killed_while_saving_a_guide_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    claim(out, {"steps": 4}, resume=False)
    for folder in (out, out / "steps-2"):
        folder.mkdir(exist_ok=True)
        saving = make_temporary_folder(folder / "guide")
        (saving / "config.json").write_text("{}")
        temporary_beside(saving / "weights.safetensors")
        (folder / "kept.json").write_text("{}")
    claim(out, {"steps": 4}, resume=True)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == [
        "kept.json", "run.json", "steps-2", "steps-2/kept.json",
    ]  # fmt: skip

"""A fine-tune plugged into an engine whose guide has a sharpener keeps the sharpener, even if the guide is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.runtime.pipeline import Pipeline


def test_plugging_keeps_the_sharpener(
    micro_base: Path, sharpened_guide: Path, tuned_unet: Path, tmp_path: Path
) -> None:
    shutil.copytree(sharpened_guide, tmp_path / "guide")
    engine = build(BuildSpec(str(micro_base), str(tmp_path / "guide"), precision="fp16", out=tmp_path / "engine"))
    plugged = [plug(PlugSpec(str(engine.folder), str(tuned_unet), out=tmp_path / "with"))]
    shutil.rmtree(tmp_path / "guide")
    plugged.append(plug(PlugSpec(str(engine.folder), str(tuned_unet), out=tmp_path / "without")))
    assert [b.manifest.plugged.guide_read_from for b in plugged] == [str(tmp_path / "guide"), "the graph itself"]
    for built in plugged:
        for file in ("sharpener.onnx", "sharpener.onnx.data"):
            assert built.manifest.files[file].sha256 == engine.manifest.files[file].sha256
    plain, other = (
        Pipeline.load(plugged[1].folder, provider="cpu")("a red apple", guidance=6.0, steps=4, negative=n)[0].pixels
        for n in (None, "red")
    )
    assert not np.array_equal(plain, other)

"""The training recipe of the bundled model, as far as it can be checked without its downloads."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.emoji import autoencoder, train
from benchmarks.emoji.data import BASE_STYLES, FINE_TUNE_STYLES, JUDGE_STYLES, caption, split
from benchmarks.emoji.presets import PRESETS
from benchmarks.emoji.prompts import lines


def test_the_split_is_disjoint_and_large_enough() -> None:
    parts = split()
    names = [n for part in parts.values() for n in part]
    assert len(names) == len(set(names))
    assert len(parts["train"]) >= 400
    assert len(parts["held_out"]) >= 40 and len(parts["held_out_colour_shape"]) >= 8


def test_held_out_colours_and_shapes_are_trained_in_other_combinations() -> None:
    parts = split()
    for concept in parts["held_out_colour_shape"]:
        colour, shape = concept.split("-")
        assert any(n.startswith(f"{colour}-") for n in parts["train"])
        assert any(n.endswith(f"-{shape}") for n in parts["train"])


def test_styles_have_distinct_words() -> None:
    words = [s.word for group in (BASE_STYLES, FINE_TUNE_STYLES, JUDGE_STYLES) for s in group]
    assert len(words) == len(set(words)) == 6


def test_the_prompt_file_is_current_and_has_no_held_out_concepts() -> None:
    written = Path("calibration/emoji-prompts.txt").read_text().splitlines()
    assert written == lines()
    parts = split()
    held_out = {caption(c) for c in (*parts["held_out"], *parts["held_out_colour_shape"])}
    for line in written:
        assert line.split(",")[0].removeprefix("a ").removeprefix("an ") not in held_out


def test_captions_are_empty_or_styled_at_the_expected_rates() -> None:
    rng = random.Random(0)
    captions = [train.write_caption("red-apple", "noto", rng, 0.1) for _ in range(4000)]
    assert 0.08 < captions.count("") / len(captions) < 0.12
    styled = sum("noto style" in s for s in captions) / len(captions)
    assert 0.70 < styled < 0.83
    assert all(s == "" or "red apple" in s for s in captions)


def test_the_encoder_equals_the_patch_code() -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (6, 8, 8, 3)), np.ones((1, 4, 4, 1), int))
    pixels = (smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
    weight, bias = autoencoder.principal_code(pixels, 8)
    vae = autoencoder.build(weight, bias, width=8, blocks=(0, 0, 0))
    expected = torch.nn.functional.conv2d((autoencoder.to_tensor(pixels) + 1) / 2, weight, bias, stride=4)
    assert torch.allclose(autoencoder.encode(vae, pixels), expected, atol=1e-4)


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    preset = PRESETS["smoke"]

    def module() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(3, 1)

    def run(folder: Path, stop: int | None) -> torch.Tensor:
        m = module()
        folder.mkdir(exist_ok=True)

        def loss(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (m(x).float() - x.sum(1, keepdim=True)).pow(2).mean()

        ema = train.run_loop("m", m, loss, 6, 0.1, preset, folder)
        return ema.shadow["weight"]

    whole = run(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 5)
    assert torch.equal(run(tmp_path / "b", None), whole)

"""FID and CLIP score, with random weights of the same architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pnp_trt.bench.metrics.clip import ClipScorer
from pnp_trt.bench.metrics.inception import WIDTH, Inception, build, frechet
from pnp_trt.errors import InputError


def direct(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Fréchet distance from the eigenvalues of the product of the covariances."""
    a, b = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 40), st.integers(2, 40))
def test_the_distance_matches_its_definition_for_few_and_many_images(seed: int, width: int, m: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(m, width)), rng.normal(0.3, 1.5, size=(n, width))
    distance = frechet(x, y, draws=2)
    # eigenvalues that should be 0 are rounding errors, and their roots are larger
    assert distance.value == pytest.approx(direct(x, y), abs=2e-5) and distance.count == n
    assert distance.low <= distance.value <= distance.high
    assert frechet(y, x, draws=2).value == pytest.approx(distance.value, abs=1e-9)
    assert frechet(x, x, draws=2).value == pytest.approx(0, abs=1e-9)


def test_the_distance_of_a_shift_by_hand() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert frechet(x, x + 2.0).value == pytest.approx(16)
    with pytest.raises(InputError, match="generated features must have shape"):
        frechet(x, x[:, :3])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build(fid=True).state_dict()


def saved(folder: Path, weights: dict[str, torch.Tensor], classes: int) -> Path:
    file = folder / "inception.safetensors"
    save_file({**weights, "fc.weight": torch.zeros(classes, WIDTH), "AuxLogits.fc.bias": torch.zeros(3)}, file)
    return file


def test_inception_has_the_published_size_and_names(weights: dict[str, torch.Tensor]) -> None:
    # torchvision's inception_v3 has 27,161,264 weights; classifier and auxiliary head are left out here
    assert sum(p.numel() for p in build(fid=False).parameters()) == 27_161_264 - (2048 * 1000 + 1000) - 3_326_696
    for name, shape in (
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)), ("Mixed_5b.branch5x5_2.conv.weight", (64, 48, 5, 5)),
        ("Mixed_6a.branch3x3dbl_3.bn.running_var", (96,)), ("Mixed_6b.branch7x7dbl_2.conv.weight", (128, 128, 7, 1)),
        ("Mixed_7a.branch7x7x3_4.conv.weight", (192, 192, 3, 3)),
        ("Mixed_7c.branch3x3_2a.conv.weight", (384, 384, 1, 3)),
    ):  # fmt: skip
        assert tuple(weights[name].shape) == shape


def test_features_depend_on_the_image_and_on_the_kind_of_inception(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    fid = Inception(saved(tmp_path, weights, 1008))(images)
    other = Inception(saved(tmp_path, weights, 1000))(images)
    assert fid.shape == (2, WIDTH) and fid.dtype == np.float32 and np.isfinite(fid).all()
    assert not np.allclose(fid[0], fid[1]) and not np.allclose(fid, other)


def test_other_weights_are_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match="has 10 classes in 'fc.weight'; FID's network has 1,008"):
        Inception(saved(tmp_path, weights, 10))
    less = {k: v for k, v in weights.items() if k != "Mixed_7c.branch1x1.conv.weight"}
    with pytest.raises(InputError, match=r"'Mixed_7c.branch1x1.conv.weight' is missing or has another shape"):
        Inception(saved(tmp_path, less, 1008))
    (tmp_path / "x.pth").write_bytes(b"pickled")
    with pytest.raises(InputError, match="pickled weights are not read"):
        Inception(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Inception(tmp_path / "x.safetensors")


def test_the_clip_score_is_a_hundred_times_the_cosine_and_never_below_0(clip_folder: Path) -> None:
    scorer = ClipScorer(clip_folder)
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    prompts = [f"a {word} thing number {i}" for i, word in enumerate(["red", "blue"] * 10)]
    scores = scorer(images, prompts)
    assert scores.shape == (20,) and (scores >= 0).all() and (scores <= 100).all() and scores.std() > 0
    assert scorer(images[::-1].copy(), prompts[::-1]) == pytest.approx(scores[::-1], abs=1e-3)
    # by hand, at the model's image size: no resizing, only OpenAI's mean and standard deviation
    x = torch.from_numpy(images[:1]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(scorer._mean).view(3, 1, 1)) / torch.tensor(scorer._std).view(3, 1, 1)
    ids = scorer._tokenizer(prompts[:1], return_tensors="pt").input_ids
    with torch.no_grad():
        output = scorer._model(input_ids=ids, pixel_values=x)
    cosine = float((output.image_embeds * output.text_embeds).sum())
    assert scores[0] == pytest.approx(max(100 * cosine, 0), abs=1e-2)
    with pytest.raises(InputError, match="20 images do not match 1 prompts"):
        scorer(images, ["a"])


def test_folders_without_a_clip_model_are_refused(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(InputError, match="holds no config.json, not a CLIP model"):
        ClipScorer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="holds bert, not a CLIP model"):
        ClipScorer(tmp_path)
    shutil.copy(clip_folder / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds no \.safetensors"):
        ClipScorer(tmp_path)

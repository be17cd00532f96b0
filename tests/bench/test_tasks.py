"""What is drawn and judged: the bundled captions with their real images' features, and the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.emoji.runner import captions
from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.tasks import FEATURES, JUDGE, find_real, make_task, read_features, real_features, real_key
from pnp_trt.bench.plan import IMAGES, IMAGES_UNJUDGED, Plan
from pnp_trt.errors import InputError


def test_the_bundled_features_are_those_of_the_captions_that_the_tables_measure() -> None:
    features, rows, about = read_features(FEATURES)
    assert rows == [(a.concept, a.style, a.seed) for a in captions("train", 512)]
    assert features.shape == (512, 1280) and features.dtype == np.float32
    assert np.isfinite(features).all() and (features >= 0).any(1).all() and features.std() > 0.1
    assert {v["licence"] for v in json.loads(about["pictures"]).values()} == {"Apache-2.0", "CC-BY-4.0"}
    assert abs(float(about["kid_changed_by_float16"])) < 1e-4
    # the judge sees in real images what their captions say; with another jitter the tables have 42.6 [38.4, 46.9] %
    ranks = fidelity.AlignmentHead.load(JUDGE).ranks(features, [c for c, _, _ in rows])
    assert 0.384 < fidelity.recall(ranks, 1).value < 0.469


def test_the_bundled_task_draws_the_captions_of_its_real_images() -> None:
    task = make_task(Plan(images=5), "emoji")
    assert task.prompts[0] == captions("train", 5)[0].prompt and task.seeds == (1000, 1001, 1002, 1003, 1004)
    assert task.concepts is not None and task.real is not None and len(task.real) == len(task.concepts) == 5
    assert task.reason is None and task.columns[0] == "red apple" and task.shown[0] == "red apple, noto style"
    assert len(make_task(Plan(), "emoji").prompts) == IMAGES
    with pytest.raises(InputError, match="images is 513, but only 512 bundled captions have real images"):
        make_task(Plan(images=513), "emoji")


def test_another_base_is_drawn_and_not_judged_and_says_why() -> None:
    task = make_task(Plan(), "emoji-3d")
    assert task.real is None and task.concepts is None and len(task.prompts) == IMAGES_UNJUDGED
    assert task.reason is not None and "base model 'emoji-3d'; name prompts and real images with" in task.reason
    assert len(set(task.seeds)) == len(task.seeds)
    assert make_task(Plan(clip="folder"), "emoji-3d").reason is None  # CLIP needs no real images


def test_named_prompts_are_repeated_with_seeds_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("a cat\n\na dog\n")
    task = make_task(Plan(prompts=str(file), images=5), "emoji")
    assert task.prompts == ("a cat", "a dog", "a cat", "a dog", "a cat") and task.seeds == (0, 1, 2, 3, 4)
    assert task.columns == task.shown and task.real is None and "name them with --real DIR" in str(task.reason)
    file.write_text("\n")
    with pytest.raises(InputError, match="has no prompts"):
        make_task(Plan(prompts=str(file)), "emoji")


def colour(images: np.ndarray) -> np.ndarray:
    """A stand-in for features: each image's mean colour and its size."""
    return np.array([[*p.mean((0, 1)), p.shape[0]] for p in images], np.float32)


def test_real_images_of_any_size_are_read_and_broken_ones_are_named(tmp_path: Path) -> None:
    for i, (name, size) in enumerate((("a.png", (4, 4)), ("b.jpg", (8, 6)), ("sub/c.webp", (5, 5)))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (10 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "d.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    assert [p.name for p in find_real(tmp_path)] == ["a.png", "b.jpg", "d.png", "c.webp"]
    with pytest.warns(UserWarning, match=r"1 files of .* cannot be read and are left out: d.png"):
        found = real_features(tmp_path, colour)
    assert found[:, 3].tolist() == [4, 6, 5]
    before = real_key(tmp_path)
    Image.new("RGB", (4, 4), (0, 9, 0)).save(tmp_path / "a.png")
    assert real_key(tmp_path) != before


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("a cat\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds 0 images \(.png, .jpg, .*\); at least 2 are needed"):
        make_task(Plan(prompts=str(words), real=str(tmp_path / "empty")), "emoji")


def test_features_of_another_extractor_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "f.safetensors"
    save_file({"features": np.zeros((1, 4), np.float16)}, file, {"captions": '[["a", "b", 1]]'})
    with pytest.raises(InputError, match="created with another extractor"):
        read_features(file)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="has no valid features of real images"):
        read_features(file)

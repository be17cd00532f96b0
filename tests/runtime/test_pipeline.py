"""Sampling from built bundles: images, and the requests and bundles that are refused."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pnp_trt.bundle.profiles import Profile
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError, PnpError
from pnp_trt.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def plain(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "plain", provider="cpu")


@pytest.fixture(scope="module")
def guided(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "guided", provider="cpu")


def same_but_for_rounding(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two images differ only by float32 rounding.

    Another batch size may run other kernels, which add in another order. The error of a thousandth of a level changes
    a byte by one if its value is that close to the middle of two levels.
    """
    off = np.abs(a.astype(int) - b.astype(int))
    return bool(off.max() <= 1 and (off > 0).mean() < 0.01)


def test_an_image_does_not_depend_on_its_batch(plain: Pipeline, guided: Pipeline) -> None:
    for pipe in (plain, guided):
        alone = pipe("a cat", steps=4, seed=7)[0].pixels
        among = pipe(["a dog", "a cat", "a house"], steps=4, seed=[1, 7, 2], guidance=[2.0, 3.0, 8.0])[1].pixels
        assert same_but_for_rounding(alone, among)


def test_a_large_request_is_split(plain: Pipeline) -> None:
    many = plain(["a cat"] * 40, steps=1, seed=list(range(40)))
    assert len(many) == 40
    assert same_but_for_rounding(many[35].pixels, plain("a cat", steps=1, seed=35)[0].pixels)
    assert not same_but_for_rounding(many[34].pixels, many[35].pixels)


def test_images_are_run_in_batches_that_the_engine_supports(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine for one or four images cannot run a batch of three."""
    monkeypatch.setattr(plain, "profiles", (Profile("b1", 1, 1, 1), Profile("b4", 4, 4, 4)))
    run, batches = plain._run, []
    monkeypatch.setattr(plain, "_run", lambda *a, **k: (batches.append(len(a[1])), run(*a, **k))[1])
    images = plain(["a cat"] * 7, steps=1, seed=list(range(7)))
    assert batches == [4, 1, 1, 1] and [image.parameters["seed"] for image in images] == list(range(7))


def test_seed_prompt_and_scale_each_change_the_image(guided: Pipeline) -> None:
    base = guided("a cat", steps=4, seed=0, guidance=3.0)[0].pixels
    for other in (
        guided("a cat", steps=4, seed=1, guidance=3.0),
        guided("a red house", steps=4, seed=0, guidance=3.0),
        guided("a cat", steps=4, seed=0, guidance=8.0),
    ):
        assert not np.array_equal(base, other[0].pixels)


def test_guided_at_w_one_equals_the_unguided_teacher(plain: Pipeline, guided: Pipeline) -> None:
    a = guided("a cat", steps=4, guidance=1.0)[0].pixels.astype(int)
    b = plain("a cat", steps=4, guidance=1.0, method="unguided")[0].pixels.astype(int)
    c = plain("a cat", steps=4, guidance=1.0, method="cfg")[0].pixels.astype(int)
    assert np.abs(a - b).max() <= 1 and np.abs(b - c).max() <= 1


def test_progress_counts_to_the_last_step(plain: Pipeline) -> None:
    calls: list[tuple[int, int]] = []
    plain(["a"] * 33, steps=3, callback=lambda i, n: calls.append((i, n)))
    assert calls == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be between 1 and 1000"),
        ({"guidance": 0.5}, "guidance is 0.5; it must be between 1 and 9"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "1 prompts and 2 values of seed"),
        ({"method": "guided"}, "cannot do 'guided'; it can do: cfg, unguided"),
    ],
)
def test_bad_requests_are_refused_with_the_range(plain: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain("a cat", **{"steps": 2} | arguments)


def test_latents_that_are_not_finite_are_refused(plain: Pipeline) -> None:
    latents = plain.noise([0, 1])
    latents[1, 0, 0, 0] = np.nan
    with pytest.raises(PnpError, match="latents of image 1 are not finite"):
        plain.decode(latents)


@pytest.fixture
def damaged(micro_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_bundles / "plain", tmp_path / "plain"))


@pytest.mark.parametrize("name", ["unet.onnx", "unet.onnx.data", "tokenizer.json", "vae_decoder.onnx.data"])
def test_one_flipped_byte_is_refused_with_the_rebuild_command(damaged: Path, name: str) -> None:
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} is corrupt .*pnp-trt build .*--force"):
        Pipeline.load(damaged)


def test_a_truncated_or_missing_file_is_refused(damaged: Path) -> None:
    data = (damaged / "unet.onnx.data").read_bytes()
    (damaged / "unet.onnx.data").write_bytes(data[:-10])
    with pytest.raises(InputError, match=f"unet.onnx.data has {len(data) - 10} bytes, not {len(data)}"):
        open_bundle(damaged)
    (damaged / "unet.onnx.data").unlink()
    with pytest.raises(InputError, match="unet.onnx.data is missing"):
        open_bundle(damaged)


def test_a_bad_manifest_is_refused(damaged: Path) -> None:
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99, this version reads 2"):
        open_bundle(damaged)
    path.write_text(json.dumps(manifest)[:-20])
    with pytest.raises(InputError, match="not readable as JSON"):
        open_bundle(damaged)
    del manifest["scheduler"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="lacks scheduler"):
        open_bundle(damaged)


def test_an_unknown_engine_lists_the_known_ones(engines: Path) -> None:
    with pytest.raises(InputError, match="no engine named 'nope'; known engines: guided, plain"):
        Pipeline.load("nope")


def runtime_packages() -> set[str]:
    """Return the canonical names of what ``pip install pnp-trt`` installs without extras."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names: set[str] = set()
    todo = [Requirement(line) for line in project["dependencies"]]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in names or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            todo += map(Requirement, importlib.metadata.requires(name) or [])
    return names


def test_sampling_runs_with_the_runtime_dependencies_alone(engines: Path, tmp_path: Path) -> None:
    """A process that can import no other package, such as torch, samples from a built bundle."""
    installed = runtime_packages()
    owners = importlib.metadata.packages_distributions()
    hidden = {m for m, d in owners.items() if not any(canonicalize_name(name) in installed for name in d)} - {"pnp_trt"}
    assert {"torch", "diffusers", "transformers", "onnx", "accelerate", "peft"} <= hidden
    assert not {"numpy", "onnxruntime", "typer", "PIL"} & hidden
    program = (
        "import sys\n"
        f"hidden = {hidden!r} - {{m.split('.')[0] for m in sys.modules}}\n"  # modules that Python loads at startup
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in hidden:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import pnp_trt.backends.tensorrt.backend, pnp_trt.backends.tensorrt.network, pnp_trt.backends.cuda_graph\n"
        f"sys.argv = ['pnp-trt', 'sample', 'a cat', '--engine', 'guided', '--steps', '2', '--out', {str(tmp_path)!r}]\n"
        "from pnp_trt.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(sorted(hidden & {m.split('.')[0] for m in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert [p.name for p in tmp_path.glob("*.png")] == ["a-cat-0.png"]

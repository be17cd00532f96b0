"""No user files are lost: what --force may remove, what a run's folder may contain, and names that never clash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pnp_trt.bench.work import Work
from pnp_trt.bundle.runs import claim
from pnp_trt.errors import InputError
from pnp_trt.io.replacing import check_removable_bundle, check_removable_file
from pnp_trt.runtime.images import grid, read_parameters, save_new

from ..conftest import Result

Cli = Callable[..., Result]
MANIFEST = json.dumps(
    {"schema": 2, "name": "x", "built_from": {}, "networks": {}, "files": {"extra.bin": {}}}, indent=2
)
WEIGHTS = json.dumps({"schema": 1, "networks": {}})
BUNDLE = {"manifest.json": MANIFEST, "tokenizer.json": "{}", "unet.onnx": "", "unet.onnx.data": "", "golden.npz": ""}


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder.mkdir(exist_ok=True)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


OURS = {
    "empty": {},
    "whole": BUNDLE,
    "listed in the manifest": BUNDLE | {"extra.bin": ""},
    "cut manifest": BUNDLE | {"manifest.json": MANIFEST[: len(MANIFEST) // 2]},
    "flipped manifest": BUNDLE | {"manifest.json": MANIFEST.replace('"name"', '"nam\x00')},
    "no manifest": {k: v for k, v in BUNDLE.items() if k != "manifest.json"} | {"weights.json": WEIGHTS},
    "empty manifest": BUNDLE | {"manifest.json": "", "weights.json": WEIGHTS},
    "interrupted manifest": {"unet.onnx": "", "weights.json": WEIGHTS, ".manifest.json.partial-0123abcd": ""},
}
FOREIGN = {
    "tokenizer and precious": ({"tokenizer.json": "{}", "precious.bin": "x"}, "precious.bin"),
    "a model folder": ({"tokenizer.json": "{}", "config.json": "{}", "model.safetensors": ""}, "config.json"),
    "names of a bundle alone": ({"tokenizer.json": "{}", "unet.onnx": "", "vae_decoder.onnx": ""}, "tokenizer.json"),
    "a browser extension": ({"manifest.json": '{"manifest_version": 3, "name": "x"}'}, "manifest.json"),
    "another schema": (
        {"manifest.json": '{"schema": "v1", "files": {"thesis.txt": 1}}', "thesis.txt": "x"},
        "manifest.json, thesis.txt",
    ),
    "a note in a bundle": (BUNDLE | {"notes.txt": "x"}, "notes.txt"),
    "a folder in a bundle": (BUNDLE | {"photos/a.jpg": "x"}, "photos/a.jpg"),
    "a note in a broken one": ({"unet.onnx": "", "weights.json": WEIGHTS, "notes.txt": "x"}, "notes.txt"),
    "a hidden file": ({".git": "x"}, ".git"),
    "many": ({f"file-{n}": "x" for n in range(9)}, "file-0, file-1, file-2 and 6 more"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OURS))
def test_recognisable_bundles_may_be_removed(tmp_path: Path, name: str) -> None:
    check_removable_bundle(make(tmp_path / "x", OURS[name]))


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_other_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    files, listed = FOREIGN[name]
    with pytest.raises(InputError) as caught:
        check_removable_bundle(make(tmp_path / "x", files))
    assert f"holds {listed}" in str(caught.value) and "choose another --out" in str(caught.value)
    assert contents(tmp_path / "x") == files


def test_links_in_a_bundle_are_not_followed(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x", BUNDLE)
    (bundle / "images").symlink_to(make(tmp_path / "y", {"a.jpg": "x"}))
    with pytest.raises(InputError, match="holds images"):
        check_removable_bundle(bundle)
    (bundle / "images").unlink()
    (bundle / "empty").mkdir()
    with pytest.raises(InputError, match="holds empty/"):
        check_removable_bundle(bundle)


@pytest.mark.parametrize("command", ["build", "plug"])
def test_force_keeps_a_folder_that_is_not_a_bundle(
    cli: Cli, engines: Path, micro_base: Path, tmp_path: Path, command: str
) -> None:
    files = {"tokenizer.json": "{}", "precious.bin": "dear"}
    clip = make(tmp_path / "clip", files)
    (tmp_path / "link").symlink_to("clip")
    first = ["build", "--guide", "none"] if command == "build" else ["plug", "guided"]
    for out in (clip, tmp_path / "link"):
        done = cli(*first, "--base", micro_base, "--out", out, "--force")
        assert done.code == 2 and "precious.bin" in done.err and "not a bundle" in done.err, done.err
    assert contents(clip) == files and (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["clip", "link"]


def test_force_replaces_the_target_of_a_link(cli: Cli, engines: Path, micro_base: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(engines / "plain", store / "v1")
    (store / "v1" / "unet.onnx").write_bytes(b"damaged")
    (tmp_path / "current").symlink_to("store/v1")
    out = tmp_path / "current"
    refused = cli("plug", "guided", "--base", micro_base, "--out", out)
    assert refused.code == 2 and "--force" in refused.err
    done = cli("plug", "guided", "--base", micro_base, "--out", out, "--force")
    assert done.code == 0, done.err
    assert (
        out.is_symlink() and (store / "v1" / "condition.onnx").exists() == (engines / "guided/condition.onnx").exists()
    )
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert sorted(p.name for p in store.iterdir()) == [".v1.lock", "v1"]
    assert cli("plug", "guided", "--base", micro_base, "--out", out).out.startswith(f"{out} is up to date")


def test_a_file_of_another_kind_is_not_replaced(cli: Cli, tmp_path: Path) -> None:
    check_removable_file(tmp_path / "none", "pnp-trt/bench/", "--json", "a results file")
    (tmp_path / "old.json").write_text('{\n  "schema": "pnp-trt/bench/1",\n  "x": 1}')
    check_removable_file(tmp_path / "old.json", "pnp-trt/bench/", "--json", "a results file")
    for name, text in {"thesis.json": "my thesis", "other.json": '{"schema": "pnp-trt/calibration/1"}'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"--json .*{name} exists and is not a results file of pnp-trt"):
            check_removable_file(tmp_path / name, "pnp-trt/bench/", "--json", "a results file")
    for option in ("--json", "--html", "--grid"):
        done = cli("bench", option, tmp_path / "thesis.json", "--quick")
        assert done.code == 2 and "exists and is not a" in done.err, done.err
    same = cli("bench", "--json", tmp_path / "a", "--html", tmp_path / "a", "--quick")
    assert same.code == 2 and "--json and --html are the same file" in same.err
    assert (tmp_path / "thesis.json").read_text() == "my thesis"


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", [".run.json.abc_1234", ".run.json.partial-0123abcd"])
def test_a_run_killed_before_its_record_was_written_can_be_resumed(tmp_path: Path, name: str) -> None:
    make(tmp_path / "run", {name: "{"})
    claim(tmp_path / "run", {"a": 1}, resume=True)
    assert sorted(contents(tmp_path / "run")) == ["run.json"]
    make(tmp_path / "run", {f"states/{name.replace('run', 'states')}": "{", "states/.x": "dear"})
    claim(tmp_path / "run", {"a": 1}, resume=True)
    assert sorted(contents(tmp_path / "run")) == ["run.json", "states/.x"]
    make(tmp_path / "bench", {name: "{"})
    with Work(tmp_path / "bench", {"a": 1}, resume=True) as work:
        work.table("t", 0, lambda: 1)
        work.done()
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is damaged"), ('{"key":', "is damaged"), ("[1]", "it holds a list"), ("1", "it holds a int"),
     ("[" * 100_000, "is damaged")],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path: Path, text: str, said: str) -> None:
    make(tmp_path / "run", {"run.json": text, "thesis.txt": "dear"})
    with pytest.raises(InputError, match=said):
        claim(tmp_path / "run", {"a": 1}, resume=True)
    assert contents(tmp_path / "run")["thesis.txt"] == "dear"


def test_the_work_folder_keeps_user_files(tmp_path: Path) -> None:
    with Work(tmp_path / "w", {}) as work:
        work.table("t", 0, lambda: 1)
        work.arrays("n", 0, lambda: {"x": np.zeros(2)})
        make(tmp_path / "w", {"notes.txt": "dear", "sub/x.json": "1"})
        work.done()
    assert contents(tmp_path / "w") == {"notes.txt": "dear", "sub/x.json": "1"}


def test_a_full_disk_leaves_no_partial_piece(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; import numpy as np; from pathlib import Path\n"
        "from pnp_trt.bench.work import Work; from pnp_trt.errors import PnpError\n"
        f"work = Work(Path({str(tmp_path / 'w')!r}), {{}})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: work.arrays('n', 0, lambda: {'x': np.arange(9999)})\n"
        "except PnpError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "could not be written (File too large)" in done.stdout and "free some space" in done.stdout
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["run.json"]


# ------------------------------------------------------------------------------------------------------------ images


def test_concurrent_processes_never_lose_an_image(tmp_path: Path) -> None:
    """Four processes each write 40 images of the same name; every image is complete and belongs to its writer."""
    program = (
        "import sys; import numpy as np; from pathlib import Path; from pnp_trt.runtime.images import save_new\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(40):\n"
        "    save_new(np.full((8, 8, 3), number, np.uint8), {'id': f'{sys.argv[1]}/{number}'},\n"
        f"             Path({str(tmp_path)!r}), 'a-cat-0', beside='.json')\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        child.communicate("\n")
        assert child.returncode == 0
    images = sorted(tmp_path.glob("*.png"))
    ids = [read_parameters(path)["id"] for path in images]
    assert sorted(ids) == sorted(f"{n}/{number}" for n in range(4) for number in range(40))
    for path, written in zip(images, ids, strict=True):
        assert json.loads(path.with_suffix(".json").read_text())["id"] == written
        assert np.asarray(Image.open(path))[0, 0, 0] == int(written.partition("/")[2])
    assert len(list(tmp_path.iterdir())) == 2 * len(images)


def test_names_count_up_past_files_and_dangling_links(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    (tmp_path / "x-2.png").write_text("dear")
    (tmp_path / "x-3.png").symlink_to("nowhere")
    (tmp_path / "x-4.json").write_text("dear")
    names = [save_new(pixels, {}, tmp_path, "x", beside=".json").name for _ in range(3)]
    assert names == ["x.png", "x-5.png", "x-6.png"]
    assert (tmp_path / "x-2.png").read_text() == (tmp_path / "x-4.json").read_text() == "dear"


@pytest.mark.parametrize("label", ["a" * 100_000, "word " * 20_000, "line\n" * 20_000, "短" * 100_000])
def test_a_grid_of_long_prompts_has_a_bounded_width(label: str) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    page = grid([(label, [pixels] * 2), ("a cat", [pixels] * 2)], [label, "seed 1"], cell=64)
    assert page.shape[1] <= 2 * 70 + 400 and page.shape[0] <= 2 * 70 + 60


def test_a_short_label_is_shown_as_it_is() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    short, long = (grid([(label, [pixels])], ["seed 0"], cell=64) for label in ("a cat", "a cat on the mat " * 9))
    assert short.shape[1] < long.shape[1] <= 70 + 400


# -------------------------------------------------------------------------------------------------- paths, end to end


def commands(base: Path, guide: Path, prompts: Path) -> dict[str, list[object]]:
    return {
        "build": ["build", "--base", base, "--guide", "none", "--out"],
        "plug": ["plug", "guided", "--base", base, "--out"],
        "distill guidance": ["distill", "guidance", "--base", base, "--prompts", prompts, "--out"],
        "distill steps": ["distill", "steps", "--base", base, "--guide", guide, "--prompts", prompts, "--out"],
        "states": ["distill", "guidance", "--base", base, "--prompts", prompts, "--out", prompts.parent / "o",
                   "--states-dir"],
        "sample": ["sample", "a cat", "--engine", "guided", "--out"],
        "sample grid": ["sample", "a cat", "--engine", "guided", "--out", prompts.parent / "o", "--grid"],
        "bench json": ["bench", "--engine", "guided", "--engine", "plain", "--json"],
        "bench html": ["bench", "--engine", "guided", "--engine", "plain", "--html"],
        "bench grid": ["bench", "--engine", "guided", "--engine", "plain", "--grid"],
        "bench work": ["bench", "--engine", "guided", "--engine", "plain", "--work"],
        "visualize": ["visualize", "a cat", "--base", base, "--guide", guide, "--out"],
        "compare": ["compare", prompts, prompts, "--json"],
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(commands(Path(), Path(), Path())))
def test_an_unwritable_path_is_reported_before_the_work(
    cli: Cli, engines: Path, micro_base: Path, micro_guide: Path, tmp_path: Path, name: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(p.name for p in tmp_path.iterdir())
    words = commands(micro_base, micro_guide, prompts)[name]
    option = str(words[-1])
    places = [prompts / "x", tmp_path / "loop" / "x", tmp_path / ("n" * 300), Path("/proc/x")]
    file = option in ("--json", "--html", "--grid")
    for place in [*places, *([Path(), Path("/"), tmp_path] if file else [prompts])]:
        done = cli(*words, place)
        assert done.code == 2 and f"pnp-trt: {option} " in done.err, (place, done.err)
        lines = [line for line in done.err.splitlines() if line.startswith("pnp-trt: ")]
        assert len(lines) == 1 and "unexpected" not in done.err and "Traceback" not in done.err
        assert sorted(p.name for p in tmp_path.iterdir()) == before, place


def test_the_current_folder_is_never_replaced(
    cli: Cli, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    monkeypatch.chdir(tmp_path)
    for out in ("", ".", "..", "/"):
        done = cli("build", "--base", micro_base, "--guide", "none", "--out", out, "--force")
        assert done.code == 2 and "current folder or one above it" in done.err
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_all_images_are_written_although_the_output_pipe_is_closed(engines: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m pnp_trt sample 'a cat' --engine guided --steps 1 -n 30 --out {tmp_path / 's'}"
    done = subprocess.run(
        ["bash", "-c", f"PYTHONUNBUFFERED=1 {command} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 141), done.stderr
    assert len(list((tmp_path / "s").glob("*.png"))) == 30
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr


@pytest.mark.parametrize("value", ["inf", "nan", "1e300"])
def test_an_unbounded_workspace_is_refused(cli: Cli, tmp_path: Path, value: str) -> None:
    done = cli("build", "--workspace", value, "--out", tmp_path / "x")
    assert done.code == 2 and "--workspace" in done.err and "unexpected" not in done.err

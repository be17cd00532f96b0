"""The commands as their user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pnp_trt.errors import PnpError
from pnp_trt.io import process

from ..conftest import Result

Cli = Callable[..., Result]


def test_help_and_version(cli: Cli) -> None:
    assert cli("--help").code == 0
    assert cli("--version").out.startswith("pnp-trt ")


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['pnp-trt', '--help']\n"
        "from pnp_trt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'matplotlib', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_sample_writes_images_with_their_parameters(cli: Cli, engines: Path, tmp_path: Path) -> None:
    done = cli(
        "sample", "a red apple", "a cat", "-n", 2, "--engine", "guided", "--steps", 3, "--seed", 5, "--out", tmp_path
    )
    assert done.code == 0, done.err
    paths = [Path(line) for line in done.out.split()]
    assert [p.name for p in paths] == ["a-red-apple-5.png", "a-red-apple-6.png", "a-cat-5.png", "a-cat-6.png"]
    image = Image.open(paths[1])
    assert image.size == (32, 32)
    parameters = json.loads(image.text["pnp-trt"])
    assert parameters["prompt"] == "a red apple" and parameters["seed"] == 6 and parameters["method"] == "guided"


def test_sample_never_overwrites(cli: Cli, engines: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert cli("sample", "a cat", "--engine", "guided", "--steps", 2, "--out", tmp_path).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-cat-0-2.png", "a-cat-0.png"]


def test_a_long_prompt_is_cut_with_one_clear_line(cli: Cli, engines: Path, tmp_path: Path) -> None:
    done = cli("sample", "apple " * 80 + "zebra", "--engine", "guided", "--steps", 2, "--out", tmp_path)
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "dropped" in line]
    assert line.startswith("pnp-trt: the prompt has 83 tokens and was cut to 77") and "zebra" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0; it must be between 1 and 1000"),
        (["--guidance", "20"], "guidance is 20; it must be between 1 and 9"),
        (["--engine", "nope"], "no engine named 'nope'; known engines: guided, plain"),
        (["--method", "cfg-interval"], "engine 'guided' cannot do 'cfg-interval'; it can do: guided, cfg, unguided"),
        (["--provider", "tpu"], "provider is 'tpu'; known: auto, cpu, cuda"),
        (["--seed", "-4"], "seed is -4"),
    ],
)
def test_bad_sample_arguments_are_one_sentence_and_exit_2(
    cli: Cli, engines: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = cli(
        "sample",
        "a cat",
        *(["--engine", "guided"] if "--engine" not in arguments else []),
        "--out",
        tmp_path,
        *arguments,
    )
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(engines: Path) -> None:
    command = [sys.executable, "-m", "pnp_trt", "--debug", "sample", "a cat", "--engine", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_build_is_a_cache_hit_the_second_time_and_refuses_to_replace(
    cli: Cli, micro_base: Path, micro_guide: Path, engines: Path, tmp_path: Path
) -> None:
    again = cli("build", "--base", micro_base, "--guide", micro_guide, "--out", engines / "guided")
    assert again.code == 0 and "is up to date" in again.out
    other = cli("build", "--base", micro_base, "--guide", "none", "--out", engines / "guided")
    assert other.code == 2 and "contains a different or damaged bundle" in other.err and "--force" in other.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    mine = cli("build", "--base", micro_base, "--guide", "none", "--out", tmp_path / "mine", "--force")
    assert mine.code == 2 and "not a bundle" in mine.err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nope"], "no base model 'nope'; known: emoji"),
        (["--guide", "nope"], "no guide 'nope'; known: "),
        (["--precision", "int3"], "precision is 'int3'; known: fp32"),
        (["--backend", "abacus"], "the backend is 'abacus'; known: onnxruntime"),
    ],
)
def test_unknown_names_list_the_known_ones(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = cli("build", "--out", tmp_path / "x", *arguments)
    assert done.code == 2 and message in done.err
    assert not (tmp_path / "x").exists()


def test_a_guide_for_another_base_is_refused(cli: Cli, micro_guide: Path, tmp_path: Path) -> None:
    done = cli("build", "--base", "emoji", "--guide", micro_guide, "--out", tmp_path / "x")
    assert done.code == 2 and "does not fit this U-Net" in done.err
    assert not (tmp_path / "x").exists()


def test_damaged_base_weights_are_refused(cli: Cli, micro_base: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(micro_base, tmp_path / "broken"))
    weights = next((broken / "unet").glob("*.safetensors"))
    state = load_file(weights)
    state["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, weights)
    done = cli("build", "--base", broken, "--guide", "none", "--out", tmp_path / "x")
    assert done.code == 2 and "conv_in.weight holds values that are not finite" in done.err
    weights.write_bytes(weights.read_bytes()[:-100])
    done = cli("build", "--base", broken, "--guide", "none", "--out", tmp_path / "x")
    assert done.code == 2 and "was cut short" in done.err
    weights.unlink()
    done = cli("build", "--base", broken, "--guide", "none", "--out", tmp_path / "x")
    assert done.code == 2 and "holds no .safetensors" in done.err


def test_doctor(cli: Cli) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0
    assert json.loads(done.out)
    assert cli("doctor").code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_lack_of_memory_is_one_sentence(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(PnpError, match="there is not enough memory for this command; .* smaller batch"):
        process.run(fail)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    def fail() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        process.run(fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("calibrate", "--pictures", 0), "images is 0"),
        (("bench", "--pictures=1"), "images is 1"),
        (("distill", "guidance", "--out", "o", "--prompts", "p", "--pictures", -1), "grid-steps is -1"),
        # the value is taken: the next error is the steps'
        (("distill", "steps", "--guide", "g", "--out", "o", "--no-pictures", "--to", 3), "cannot be halved to 3"),
        (("distill", "steps", "--guide", "g", "--out", "o", "--pictures", "--to", 3), "cannot be halved to 3"),
    ],
)
def test_former_names_of_options_work(cli: Cli, tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    done = cli(*words)
    assert done.code == 2 and message in done.err, done.err


@pytest.mark.parametrize("command", [("calibrate",), ("bench",), ("distill", "guidance"), ("distill", "steps")])
def test_help_does_not_show_former_names(cli: Cli, command: tuple[str, ...]) -> None:
    shown = cli(*command, "--help").out
    assert "--steps" in shown and "pictures" not in shown

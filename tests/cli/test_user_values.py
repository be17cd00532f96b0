"""Bad guides, seeds, sizes, names and environments end in a one-sentence error, never in an "unexpected" one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pnp_trt.errors import InputError
from pnp_trt.models.catalog import guide_config, guide_weights

from ..conftest import Result

Cli = Callable[..., Result]


def refused(result: Result, *words: str, codes: tuple[int, ...] = (2,)) -> None:
    """Check that the exit code is in ``codes`` and that the last line is an error that contains the words."""
    assert result.code in codes, result.err[-300:]
    assert "unexpected" not in result.err and "Traceback" not in result.err
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("pnp-trt: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"a":', "not complete JSON"), ("[]", "an array, not an object"), ("{}", "lacks '_class_name'"), ("", "JSON"),
        ('{"_class_name": 3}', "'_class_name' is a number"), ("[" * 100_000, "nested too deeply"),
        ('{"_class_name": "TinyGuide", "sampling_steps": "8"}', "'sampling_steps' is a string"),
        ('{"_class_name": "TinyGuide", "sampling_steps": 0}', "'sampling_steps' is 0"),
        ('{"_class_name": "TinyGuide", "negative_prompts": "no"}', "'negative_prompts' is a string"),
    ],
)  # fmt: skip
def test_invalid_guide_configs_are_refused(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        guide_config(tmp_path)
    with pytest.raises(InputError, match="holds no .safetensors"):
        guide_weights(tmp_path)


@pytest.fixture
def bad_guides(micro_guide: Path, tmp_path: Path) -> dict[str, Path]:
    """Unusable guides: without weights, of another class, with damaged weights, other shapes or a binary config."""
    folders = {}
    for name in ("no weights", "another class", "damaged", "other shapes", "binary config"):
        folder = folders[name] = tmp_path / name
        shutil.copytree(micro_guide, folder)
        weights = next(folder.glob("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        if name == "no weights":
            weights.unlink()
        elif name == "another class":
            config["_class_name"] = "UNet2DConditionModel"
        elif name == "damaged":
            weights.write_bytes(weights.read_bytes()[:100])
        elif name == "other shapes":
            config["rank"] = 5
        (folder / "config.json").write_bytes(b"\xff\x00{" if name == "binary config" else json.dumps(config).encode())
    return folders


def test_unusable_guides_are_refused_by_every_command(
    bad_guides: dict[str, Path], micro_base: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    base = ("--base", micro_base)
    for name, folder in bad_guides.items():
        commands: list[tuple[Any, ...]] = [
            ("visualize", "a", *base, "--guide", folder, "--out", tmp_path / "v"),
            (
                "distill",
                "steps",
                *base,
                "--guide",
                folder,
                "--prompts",
                tmp_path / "p.txt",
                "--out",
                tmp_path / name[:3],
            ),
        ]
        if name in ("no weights", "binary config"):
            commands.append(("build", *base, "--guide", folder, "--out", tmp_path / "b"))
        for command in commands:
            refused(cli(*command), str(folder))


@pytest.mark.parametrize("value", ["nan", "inf", "1e308", "-1", "5000"])
def test_workspaces_out_of_range_are_refused(value: str, micro_base: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("build", "--base", micro_base, "--guide", "none", "--workspace", value, "--out", tmp_path / "b")
    assert done.code == 2 and "workspace" in done.err and "unexpected" not in done.err


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [("--lr", "inf", "learning rate"), ("--lr", "nan", "learning rate"), ("--seed", "-1", "seed"),
     ("--seed", "9" * 20, "seed"), ("--w-max", "inf", "range of w"), ("--rank", "9" * 20, "options"),
     ("--rank", "9" * 12, "options"), ("--option", "trunk_kind=7", "")],
)  # fmt: skip
def test_distill_values_out_of_range_are_refused(
    option: str, value: str, word: str, micro_base: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    arguments = ("--base", micro_base, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "d", "--num-states", 4)
    refused(cli("distill", "guidance", *arguments, "--steps", 1, "--batch", 2, "--grid-steps", 0, option, value), word)


def test_an_ema_of_nan_is_refused() -> None:
    from pnp_trt.distill.train import TrainConfig

    with pytest.raises(InputError, match="ema is nan"):
        TrainConfig(ema=float("nan")).check()


LONG = "x" * 5000


@pytest.mark.parametrize(
    "command",
    [
        ("visualize", "a", "--guide", LONG), ("build", "--guide", LONG), ("bench", "--suite", LONG),
        ("bench", "--only", "fidelity", "--prompts", LONG), ("bench", "--prompts", "p", "--real", LONG),
        ("distill", "guidance", "--prompts", LONG, "--out", "d"),
        ("distill", "guidance", "--images", LONG, "--out", "d"),
        ("compare", LONG, LONG), ("visualize", "a\udcff"), ("sample", "a\udcff"), ("bench", "--rounds", "9" * 30),
    ],
    ids=lambda command: "-".join(command)[:30].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_impossible_names_and_prompts_are_refused(
    command: tuple[str, ...], cli: Cli, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli(*command), codes=(1, 2))  # 1: the operating system refuses the path


def run(change: dict[str, str | None], *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``pnp-trt COMMAND`` in a separate process with a changed environment."""
    environment = {name: value for name, value in {**os.environ, **change}.items() if value is not None}
    code = "from pnp_trt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command], env=environment, capture_output=True, check=False)
    assert b"unexpected" not in done.stderr and b"Traceback" not in done.stderr, done.stderr[-500:]
    return done


@pytest.mark.parametrize(
    "change",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "POSIX"}],
    ids=str,
)
def test_prompts_are_the_same_in_every_locale(change: dict[str, str | None], engines: Path, tmp_path: Path) -> None:
    from pnp_trt.runtime.images import read_parameters

    prompt = "ein süßer Apfel \N{RED APPLE}"
    done = run(change, "sample", prompt, "--engine", "guided", "--steps", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-500:]
    assert read_parameters(next(tmp_path.glob("*.png")))["prompt"] == prompt


@pytest.mark.parametrize(
    "change",
    [
        {"COLUMNS": "0"}, {"COLUMNS": "x"}, {"TERM": "nonsense"}, {"TERM": ""}, {"HOME": None},
        {"HOME": "/nonexistent"}, {"PNP_TRT_ENGINES": "/dev/null"}, {"PNP_TRT_ENGINES": LONG},
        {"PNP_TRT_CACHE": "/dev/null/x"}, {"HF_HOME": "/proc/x"},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_list_works_in_odd_environments(change: dict[str, str | None], engines: Path) -> None:
    done = run(change, "list")
    # an impossible path is an error; a missing folder is one without engines
    refused_by_the_system = change.get("PNP_TRT_ENGINES") == LONG
    assert done.returncode == (1 if refused_by_the_system else 0), done.stderr[-300:]

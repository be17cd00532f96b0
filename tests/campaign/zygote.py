"""A process that imports everything once and runs cases in forked children.

``python -m tests.campaign.zygote SCRATCH`` serves requests on ``SCRATCH/socket``.  A request is a case's area and name
as JSON; the answer is its row of the report.  Every request runs in a separate process, so several run in parallel.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..commands import made_once
from .case import Case, Outcome, Place, classify, precious, row, signature

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "accelerate", "diffusers", "diffusers.loaders.lora_pipeline", "diffusers.loaders.single_file_utils", "filelock",
    "jinja2", "matplotlib.figure", "onnx", "onnxruntime", "onnxscript.optimizer", "onnxscript.rewriter", "peft",
    "PIL.Image", "safetensors.torch", "tokenizers", "torch", "torch.onnx", "transformers",
)  # fmt: skip
FROM = (("diffusers", ("AutoencoderKL", "AutoencoderTiny", "UNet2DConditionModel", "StableDiffusionPipeline",
         "DDIMScheduler")), ("transformers", ("CLIPTextModel", "CLIPTokenizer")))  # fmt: skip


class Zygote:
    """The client: starts the server, or joins one that already serves the same scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._child: subprocess.Popen[bytes] | None = None
        if not self._alive():
            self._start()

    def run(self, case: Case) -> dict[str, Any]:
        """Run one case and return its row."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.scratch / "socket"))
            line.sendall(json.dumps([case.area, case.name]).encode() + b"\n")
            with line.makefile("rb") as answer:
                text = answer.read()
        if not text:
            raise RuntimeError(f"the zygote did not answer for {case.area}: {case.name}")
        return json.loads(text)

    def stop(self) -> None:
        """Stop the server if this client started it."""
        if self._child is not None:
            self._child.terminate()
            self._child.wait()
            assert self._child.stdout is not None
            self._child.stdout.close()

    def _alive(self) -> bool:
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(str(self.scratch / "socket"))
            except OSError:
                return False
            return True

    def _start(self) -> None:
        for name in ("tmp", "home", "cache", "cases"):
            (self.scratch / name).mkdir(parents=True, exist_ok=True)
        fonts = Path.home() / ".cache" / "matplotlib"  # a font cache that takes seconds to build
        if fonts.is_dir():
            shutil.copytree(fonts, self.scratch / "home/.cache/matplotlib", dirs_exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PNP_TRT_", "COV_", "PYTEST_"))}
        search = [str(ROOT), str(Path(__file__).parent / "site")]
        environment |= {
            "HOME": str(self.scratch / "home"), "TMPDIR": str(self.scratch / "tmp"), "OMP_NUM_THREADS": "1",
            "PNP_TRT_CACHE": str(self.scratch / "cache"), "PNP_TRT_ENGINES": str(self.scratch / "fixtures/engines"),
            "PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.campaign.zygote", str(self.scratch), str(os.getppid())]
        self._child = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._child.stdout is not None
        if self._child.stdout.readline() != b"ready\n":
            raise RuntimeError("the zygote did not start")


def _preload() -> None:
    """Import everything that the commands import, except modules that start threads, which a fork would lose."""
    import importlib
    import pkgutil

    import pnp_trt

    for name in IMPORTS:
        importlib.import_module(name)
    for name, attributes in FROM:  # these packages import lazily
        for attribute in attributes:
            getattr(importlib.import_module(name), attribute)
    for module in pkgutil.walk_packages(pnp_trt.__path__, "pnp_trt."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # a backend's own library may not be installed
                importlib.import_module(module.name)
    sys.modules["torch"].set_num_threads(1)
    sys.modules["typer"].main.get_command = made_once
    sys.modules["PIL.Image"].init()
    for words in (
        ["inspect", "guided"],
        ["list"],
        ["sample", "a", "--engine", "nope"],
        ["plug", "nope", "--base", "nope"],
    ):
        _silently(words)
    for engine in Path(os.environ["PNP_TRT_ENGINES"]).glob("*/tokenizer.json"):
        sys.modules["pnp_trt.runtime.tokenizer"].Tokenizer(
            engine
        )  # commands reuse the tokenizer loaded here for equal files
        break
    gc.collect()
    gc.freeze()  # so that collections in the children do not copy shared memory pages


def _silently(words: list[str]) -> None:
    """Run a command that starts no threads, to trigger its imports on first use."""
    from .process import call

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        call(words)


def execute(case: Case, place: Place) -> dict[str, Any]:
    """Prepare a case, run it, and classify the outcome."""
    from .process import run

    before = signature(place.fixtures)
    if case.prepare is not None:
        case.prepare(place)
    belongings = precious(place.here)
    fault = None
    if case.scenario is not None:
        outcome, fault = case.scenario(place)
    else:
        outcome = run(place.words(case.arguments), place, case.surroundings)
    kind, detail = classify(case, outcome, place)
    lost = [p for p, digest in belongings.items() if precious(place.here).get(p) != digest]
    changed = sorted(set(before.items()) ^ set(signature(place.fixtures).items()))
    for sentence in (
        fault,
        f"the user's {Path(lost[0]).name} was changed or deleted" if lost else None,
        f"an input was changed: {changed[0][0]}" if changed else None,
    ):
        if kind == "OK" and sentence:
            kind, detail = "FAULT", sentence
    return row(case, outcome, kind, detail, place)


#: areas whose builds export every network themselves, because they test faults during the export
EXPORTING = ("full disk", "limits", "network", "clock", "other user")


def _share_exports(scratch: Path) -> None:
    """Share exports of equal networks between builds through one folder of the campaign."""
    from filelock import FileLock

    from ..exports import share

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = scratch / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                beside = folder.with_name(f"{folder.name}.{os.getpid()}")
                make(beside)
                beside.rename(folder)
        return folder

    share(once)


def _answer(line: socket.socket, scratch: Path) -> None:
    """Answer one request, in a separate process."""
    from .areas import find

    with line.makefile("rb") as request:
        text = request.readline()
    if not text:
        return  # a client only checked whether the server is running
    case = find(*json.loads(text))
    if case.scenario is None and case.area not in EXPORTING:
        _share_exports(scratch)
    here = scratch / "cases" / f"{os.getpid()}"
    place = Place(here, scratch / "fixtures")
    here.mkdir(parents=True)
    try:
        result = execute(case, place)
    except BaseException as e:
        import traceback

        outcome = Outcome(99, "", traceback.format_exc())
        result = row(case, outcome, "FAULT", f"the campaign itself failed: {type(e).__name__}: {e}", place)
    finally:
        _remove(here)
    (scratch / f"events.{os.getpid()}").unlink(missing_ok=True)
    line.sendall(json.dumps(result).encode())


def _remove(folder: Path) -> None:
    """Remove a case's folder, including write-protected folders in it."""
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())]:
        with contextlib.suppress(OSError):
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


def serve(scratch: Path, watched: int) -> None:
    """Answer requests until the process ``watched`` ends."""
    os.umask(0o022)
    _preload()
    from . import areas

    areas.load()
    (scratch / "socket").unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(scratch / "socket"))
    server.listen(64)
    server.settimeout(2)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print("ready", flush=True)
    while Path(f"/proc/{watched}").exists():
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            line, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                server.close()
                line.settimeout(None)
                _answer(line, scratch)
            finally:
                os._exit(0)
        line.close()


if __name__ == "__main__":
    begun = time.monotonic()
    serve(Path(sys.argv[1]), int(sys.argv[2]))

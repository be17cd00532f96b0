"""Run ``pnp-trt`` in separate processes that need not import torch and other large packages each time.

``python -m tests.forking ROOT`` imports everything that the commands import and forks a process for every line that it
reads, a JSON object of :func:`_become`'s arguments.  It answers with the exit code.  Builds in these processes share
traces in the run's folder, ``ROOT``, like builds in the tests' own process (``tests/exports.py``).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path

#: imports of the commands; none starts threads, which a fork would lose
IMPORTS = (
    "diffusers.loaders.lora_pipeline", "onnxruntime", "onnxscript.optimizer", "onnxscript.rewriter",
    "pnp_trt.bench.run", "pnp_trt.build.builder", "pnp_trt.build.onnx_export", "pnp_trt.build.parity",
    "pnp_trt.cli.app", "pnp_trt.distill.guidance", "pnp_trt.models.student", "pnp_trt.runtime.pipeline",
)  # fmt: skip
#: classes that these packages import on first use
CLASSES = {
    "diffusers": ("AutoencoderTiny", "DDIMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel"),
    "transformers": ("CLIPTextModel", "CLIPTokenizer"),
}


class Forking:
    """The forking process; :meth:`stop` ends it.

    Args:
        root: folder shared by all workers, see ``tests.conftest.once_in``.
        change: environment variables to set.
    """

    def __init__(self, root: Path, change: Mapping[str, str]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.forking", str(root)], env={**os.environ, "OMP_NUM_THREADS": "1", **change},
            cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: object) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error of ``pnp-trt WORDS``."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = {"words": list(map(str, words)), "cwd": str(Path.cwd()), "out": str(out), "err": str(err)}
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
            return int(self._child.stdout.readline()), out.read_text(), err.read_text()

    def stop(self) -> None:
        """End the forking process."""
        with self._child:  # closes both pipes, then waits
            pass


def _serve(root: Path) -> None:
    """Fork a process for each line until standard input ends."""
    import typer.main

    from .commands import made_once
    from .conftest import once_in
    from .exports import share

    for name in IMPORTS:
        importlib.import_module(name)
    for package, names in CLASSES.items():
        for name in names:
            getattr(importlib.import_module(package), name)
    share(partial(once_in, root))
    typer.main.get_command = made_once
    made_once(sys.modules["pnp_trt.cli.app"].app)
    gc.collect()
    gc.freeze()  # so that collections in the children do not copy shared memory pages
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_become(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(words: list[str], cwd: str, out: str, err: str) -> int:
    """Run the command in this process and return its exit code."""
    from .commands import exit_code

    os.chdir(cwd)
    for stream, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    try:
        code = exit_code(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))

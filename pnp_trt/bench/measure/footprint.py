"""Peak memory of a case, measured in a separate process, as cases that share a process share its memory.

The process loads the engine, generates one batch and ends. On a CPU the figure is its largest resident memory, the
interpreter and its libraries included. On a GPU it is the memory that the driver reports for the process after the
batch (runtimes do not free what they allocated), if the driver reports it.

`python -m pnp_trt.bench.measure.footprint` is that process; it reads its settings from standard input, as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from ...errors import PnpError
from ...io.process import run_child
from .cases import Case

BOUNDARY = (
    "largest resident memory of a process that loads the engine and generates one batch, interpreter and libraries "
    "included; on a GPU, the device memory that the process holds after it"
)
_PROMPT = "a red apple"
_SECONDS = 1800


@dataclass
class MemoryMeter:
    """Measures the peak memory of cases; `meters.Meters` takes one as `memory`.

    provider: as for `Pipeline.load`.
    left_out: `{"what", "why"}` of everything that could not be measured.
    """

    provider: str = "auto"
    left_out: list[dict[str, str]] = field(default_factory=list)

    def __call__(
        self, case: Case, *, batch: int, steps: int, schedule: str | None = None, size: tuple[int, int] | None = None
    ) -> int | None:
        """Return bytes, or None with an entry in `left_out`."""
        pipe: Any = case.pipe
        bundle = getattr(pipe, "bundle", None)
        peer = getattr(pipe, "peer", None)
        what = f"peak memory of {case.label}, batch {batch}"
        if bundle is None and peer is None:
            self._without(what, "it is not a bundle and cannot be loaded by another process")
            return None
        settings = {
            "engine": None if bundle is None else str(bundle.folder), "peer": peer, "method": case.method,
            "batch": batch, "steps": steps, "schedule": schedule,
            "size": size, "provider": self.provider,
        }  # fmt: skip
        try:
            result = in_own_process(settings)
        except PnpError as e:
            self._without(what, str(e))
            return None
        if result["peak_bytes"] is None:
            self._without(what, result["why"])
        bytes_: int | None = result["peak_bytes"]
        return bytes_

    def _without(self, what: str, why: str) -> None:
        self.left_out.append({"what": what, "why": why})


def in_own_process(settings: dict[str, Any]) -> dict[str, Any]:
    """Run `main` in a new process and return `peak_bytes` (int, or None and `why`) of its batch.

    Raises PnpError with the last line of the process's standard error, if it fails.
    """
    done = run_child(
        [sys.executable, "-m", __name__], input=json.dumps(settings), timeout=_SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PnpError(f"the process that measures memory failed: {reason}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Generate the batch that standard input describes, and print its peak memory."""
    settings = json.load(sys.stdin)
    if settings["peer"] is not None:
        from .peers import load

        pipe: Any = load(**settings["peer"])
    else:
        from ...runtime.pipeline import Pipeline

        pipe = Pipeline.load(settings["engine"], provider=settings["provider"])
    batch, size = settings["batch"], settings["size"]
    noise = pipe.noise(list(range(batch)), *([] if size is None else [tuple(size)]))
    case = Case(pipe, settings["method"])
    context = pipe.encode([_PROMPT] * batch)
    latents = case.denoise(context, noise, steps=settings["steps"], guidance=3.0, schedule=settings["schedule"])
    pipe.decode(latents)
    print(json.dumps(_device_bytes() if getattr(pipe, "on_gpu", False) else _host_bytes()))


def _host_bytes() -> dict[str, Any]:
    from ...bundle.memory import peak

    return {"peak_bytes": peak(), "why": "this system does not report the peak memory of a process"}


def _device_bytes(nvml: Any = None) -> dict[str, Any]:
    """Memory of this process on all GPUs."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
        usage = [
            process.usedGpuMemory
            for number in range(nvml.nvmlDeviceGetCount())
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(number))
            if process.pid == os.getpid()
        ]
    except Exception as e:  # no package, no driver, or no permission
        return {"peak_bytes": None, "why": f"the GPU's memory cannot be read ({e})"}
    known = [bytes_ for bytes_ in usage if bytes_ is not None]
    why = "the driver does not report the memory of this process, as in most containers"
    return {"peak_bytes": sum(known) or None, "why": why}


if __name__ == "__main__":
    main()

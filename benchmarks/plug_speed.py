"""Time ``pnp-trt plug`` against a full build of the same fine-tune: ``python -m benchmarks.plug_speed``.

An engine of the base is built once, unmeasured.  A U-Net of the same architecture and another seed is then saved as a
single safetensors file, the usual format of a fine-tune (also unmeasured).  Both ways to a checked bundle are timed,
each in a separate process from start to end: ``pnp-trt plug`` of the file, and ``pnp-trt build`` of the fine-tune.
With ``random:sd15`` the numbers are those of Stable Diffusion 1.5; the images would be noise.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import open_bundle, write_json

SCHEMA = "pnp-trt/plug-speed/1"
RESULTS = Path(__file__).parent / "results"
#: program that writes the U-Net of a base model to one file, in its stored type
SAVE = """
import sys
from safetensors.torch import save_file
from pnp_trt.models.bases import resolve
save_file({k: v.contiguous() for k, v in resolve(sys.argv[1]).unet().state_dict().items()}, sys.argv[2])
"""


def timed(words: list[str]) -> float:
    """Seconds of one command, from start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(base: str, fine_tune: str, guide: str, precision: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Time plug and build alternately, ``rounds`` times each; add sizes, memory and parity from their manifests."""
    pnp = ["-m", "pnp_trt"]
    common = ["--guide", guide, "--precision", precision]
    engine, plugged, built, file = (folder / n for n in ("engine", "plugged", "built", "fine-tune.safetensors"))
    timed([*pnp, "build", "--base", base, *common, "--out", str(engine)])
    timed(["-c", SAVE, fine_tune, str(file)])
    seconds: dict[str, list[float]] = {"plug": [], "build": []}
    for _ in range(rounds):
        for out in (plugged, built):
            shutil.rmtree(out, ignore_errors=True)
        seconds["plug"].append(timed([*pnp, "plug", str(engine), "--base", str(file), "--out", str(plugged)]))
        seconds["build"].append(timed([*pnp, "build", "--base", fine_tune, *common, "--out", str(built)]))
    m, full = open_bundle(plugged).manifest, open_bundle(built).manifest
    data = "unet.onnx.data"
    best = {k: min(v) for k, v in seconds.items()}
    return {
        "precision": precision,
        "seconds": {k: [round(s, 2) for s in v] for k, v in seconds.items()},
        "plug_share_of_build": round(best["plug"] / best["build"], 4),
        "peak_memory_bytes": {"plug": m.peak_memory.export, "build": full.peak_memory.export},
        "parity": {"plug": m.parity.relative_error["unet"], "build": full.parity.relative_error["unet"],
                   "limit": m.parity.limit},
        "unet_bytes": m.files[data].size,
        "same_weights_as_built": m.files[data].sha256 == full.files[data].sha256,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plug_speed", description=__doc__)
    parser.add_argument("--base", default="random:sd15")
    parser.add_argument("--fine-tune", default="random:sd15#2", help="another base model of the same architecture")
    parser.add_argument("--guide", default="tiny")
    parser.add_argument("--precision", action="append", choices=("fp32", "fp16"), help="default: both")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the bundles, about 12 GB at SD 1.5's size; default: the system's temporary folder",
    )
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/plug-speed-….json")
    a = parser.parse_args(arguments)
    rows = []
    for precision in a.precision or ["fp16", "fp32"]:
        with tempfile.TemporaryDirectory(prefix="pnp-trt-plug-", dir=a.work) as folder:
            rows.append(measure(a.base, a.fine_tune, a.guide, precision, a.rounds, Path(folder)))
        best = {k: min(v) for k, v in rows[-1]["seconds"].items()}
        share = rows[-1]["plug_share_of_build"]
        print(
            f"{precision}: plug {best['plug']:.1f} s, build {best['build']:.1f} s, {share:.1%} of the build", flush=True
        )
    out = a.out or RESULTS / f"plug-speed-{a.base.removeprefix('random:').replace('/', '-')}.json"
    command = ["python", "-m", "benchmarks.plug_speed", *(arguments if arguments is not None else sys.argv[1:])]
    document = {
        "schema": SCHEMA,
        "provenance": provenance(command),
        "case": {"backend": "onnxruntime", "base": a.base, "fine_tune": a.fine_tune, "guide": a.guide},
        "boundary": "one process, from its start to its end; the engine that is plugged and the fine-tune's file exist",
        "results": rows,
    }
    write_json(out, document)
    print(out)


if __name__ == "__main__":
    main()

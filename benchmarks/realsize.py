"""Export and compile a model of real size, and record what it took: ``make realsize``.

The weights are seeded random numbers (``--base random:sd15``): seconds, memory and sizes are those of the real model,
images would be noise.  The build runs in a separate process, so that its peak memory is its own.  For ``int8`` the
sampler is watched for three steps of one image first, and no sweep is made: a record of random weights means nothing
of real ones; what is timed is recording ranges, bringing Q/DQ into the graph, and compiling it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import open_bundle, write_json

SCHEMA = "pnp-trt/realsize/1"
RESULTS = Path(__file__).parent / "results"


def record(bundle: Path, command: list[str]) -> dict[str, Any]:
    """What a built bundle states of its making: one entry a network, and the whole."""
    m = open_bundle(bundle).manifest
    networks = {}
    for name, n in m.networks.items():
        networks[name] = {
            "precision": n.precision,
            "graph_bytes": m.size_of(n.graph),
            "engine_bytes": m.files[n.file].size if n.file != n.graph else None,
            "compile_seconds": n.compiled.seconds,
            "compile_peak_memory_bytes": n.compiled.peak_memory,
            "graph_parity": n.parity.graph,
            "parity_limit": n.parity.limit,
        }
    compiled = sum(n["compile_seconds"] for n in networks.values())
    return {
        "schema": SCHEMA,
        "provenance": provenance(command),
        "case": {k: m.to_json()[k] for k in ("backend", "precision", "target", "profiles", "compiler", "image")}
        | {"base": m.base.name, "guide": None if m.guide is None else m.guide.name, "weights": "seeded random numbers"},
        "build_seconds": m.build_seconds,
        "export_and_parity_seconds": round(m.build_seconds - compiled, 1),
        "compile_seconds": round(compiled, 1),
        "peak_memory_bytes": m.peak_memory.to_json(),
        "networks": networks,
        "engine_parity": m.parity.engine,
    }


def run(words: list[str]) -> None:
    """Run ``pnp-trt``; end as it ended."""
    done = subprocess.run([sys.executable, "-m", "pnp_trt", *words])
    if done.returncode:
        sys.exit(done.returncode)


def calibrate(base: str, guide: str, out: Path) -> dict[str, Any]:
    """Record ranges; seconds and peak memory of doing so."""
    started = time.monotonic()
    words = ["--base", base, "--guide", guide, "--pictures", "1", "--steps", "3", "--probes", "0"]
    run(["calibrate", *words, "--out", str(out)])
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": round(time.monotonic() - started, 1), "peak_memory_bytes": peak, "options": words}


def main(arguments: list[str] | None = None) -> None:
    """Build, record, throw the bundle away."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.realsize", description=__doc__)
    parser.add_argument("--base", default="random:sd15")
    parser.add_argument("--guide", default="tiny")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--target", default="sm_89", help="of the engine; 'any' for onnxruntime")
    parser.add_argument("--profile", action="append", help="batch sizes; default b1 for an engine")
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/realsize-….json")
    a = parser.parse_args(arguments)
    profiles = a.profile or ([] if a.backend == "onnxruntime" else ["b1"])
    name = "-".join(["realsize", a.base.removeprefix("random:").replace("/", "-"), a.guide, a.precision, a.target])
    with tempfile.TemporaryDirectory(prefix="pnp-trt-realsize-") as folder:
        bundle, observed = Path(folder) / "bundle", None
        if a.precision == "int8":
            observed = calibrate(a.base, a.guide, Path(folder) / "record.json")
        words = ["build", "--base", a.base, "--guide", a.guide, "--backend", a.backend, "--precision", a.precision]
        words += ["--target", a.target, *(w for p in profiles for w in ("--profile", p)), "--out", str(bundle)]
        words += ["--calibration", str(Path(folder) / "record.json")] if observed else []
        run(words)
        found = {"calibration": observed} | record(
            bundle, ["python", "-m", "benchmarks.realsize", *(arguments or sys.argv[1:])]
        )
    out = a.out or RESULTS / f"{name}.json"
    write_json(out, found)
    memory = max(v for v in found["peak_memory_bytes"].values() if v) / 2**30
    print(f"{out}: {found['build_seconds']:.0f} s, peak memory {memory:.1f} GiB")


if __name__ == "__main__":
    main()

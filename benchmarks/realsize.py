"""Export, compile, plug and run a model of real size, and record time and memory: ``make realsize``.

The weights are seeded random numbers (``--base random:sd15``).  Seconds, memory and sizes are those of the real model;
images would be noise.  The build runs in a separate process, so that its peak memory can be measured.  For ``int8`` and
``fp8``, activation ranges are first recorded over three steps of one image.  There is no sweep, because results for
random weights do not carry over to real ones; recording ranges, inserting Q/DQ nodes and compiling are timed.

``--part run`` uses an ONNX Runtime engine in float16: a build, a plug of another U-Net, one guided step and one CFG
step on the CPU, each in a separate process.  With ``--guided-only``, for SDXL, ``verify`` replaces the two steps: one
guided evaluation of the engine on its golden inputs, compared with PyTorch, which needs less memory than a sample.

``--part train`` takes three optimiser steps of stage 1, one state each, with gradient checkpointing and the processor's
own precision.

An existing record is kept, so a run that was stopped continues with what is missing; ``--again`` measures it again.
Engines are kept in ``--work`` until their record is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import open_bundle, write_json
from pnp_trt.precision.recipes import recipe

SCHEMA = "pnp-trt/realsize/1"
RESULTS = Path(__file__).parent / "results"


def record(bundle: Path, command: list[str]) -> dict[str, Any]:
    """Time, memory, sizes and parity of a build, in total and per network, from the bundle's manifest."""
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
            "kernels": n.compiled.notes.get("reports"),
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


def run(words: list[str]) -> dict[str, Any]:
    """Run ``pnp-trt``; return its seconds and peak memory, or exit with its exit code if it fails."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pnp_trt", *words])
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    return {"seconds": round(time.monotonic() - started, 1), "peak_memory_bytes": 1024 * usage.ru_maxrss}


def calibrate(base: str, guide: str, out: Path) -> dict[str, Any]:
    """Record activation ranges; return the seconds and peak memory that this took."""
    words = ["--base", base, "--guide", guide, "--images", "1", "--steps", "3", "--probes", "0"]
    return {**run(["calibrate", *words, "--out", str(out)]), "options": words}


def build(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Part ``build``: build an engine, which is deleted after its record is written."""
    profiles = a.profile or ([] if a.backend == "onnxruntime" else ["b1"])
    bundle, observed = work / "bundle", None
    if recipe(a.precision).needs_record:
        observed = calibrate(a.base, a.guide, work / "record.json")
    words = ["build", "--base", a.base, "--guide", a.guide, "--backend", a.backend, "--precision", a.precision]
    words += ["--target", a.target, *(w for p in profiles for w in ("--profile", p)), "--out", str(bundle)]
    words += ["--calibration", str(work / "record.json")] if observed else []
    run(words)
    return {"calibration": observed} | record(bundle, command())


def runs(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Part ``run``: results of completed steps are read from the work folder."""
    common = ["--base", a.base, "--backend", "onnxruntime", "--precision", "fp16"]
    # w of the build's parity check
    sample = ["sample", "a lighthouse", "--steps", "1", "--guidance", "2", "--provider", "cpu", "--quiet",
              "--out", str(work / "images")]  # fmt: skip
    guided, plain, plugged = (str(work / name) for name in ("guided", "plain", "plugged"))
    steps = {
        "build": ["build", *common, "--guide", a.guide, "--out", guided],
        "plug": ["plug", guided, "--base", f"{a.base}#2", "--out", plugged],
        "guided step": [*sample, "--engine", plugged],
        "build without a guide": ["build", *common, "--guide", "none", "--out", plain],
        "CFG step": [*sample, "--engine", plain, "--method", "cfg"],
    }
    if a.guided_only:
        steps = {"build": steps["build"], "plug": steps["plug"], "verify": ["verify", plugged, "--provider", "cpu"]}
    done = work / "steps.json"
    results: dict[str, Any] = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    for name, words in steps.items():
        if name not in results:
            results[name] = run(words)
            write_json(done, results)
    return {
        "schema": SCHEMA, "provenance": provenance(command()),
        "case": {"base": a.base, "guide": a.guide, "backend": "onnxruntime", "precision": "fp16",
                 "weights": "seeded random numbers"},
        "steps": results, "plug_to_build": round(results["plug"]["seconds"] / results["build"]["seconds"], 4),
    }  # fmt: skip


def train(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Part ``train``: states from one image and its caption, then three optimiser steps of one state each."""
    from PIL import Image

    images = work / "images"
    images.mkdir(exist_ok=True)
    Image.linear_gradient("L").convert("RGB").save(images / "gradient.png")
    (images / "gradient.txt").write_text("a gradient\n", encoding="utf-8")
    options = ["--states", "forward", "--num-states", "1", "--steps", "3", "--batch", "1", "--warmup", "0",
               "--gradient-checkpointing", "--mixed-precision", "auto", "--grid-steps", "0"]  # fmt: skip
    place = ["--base", a.base, "--guide", a.guide, "--images", str(images), "--out", str(work / "guide"), "--resume"]
    return {
        "schema": SCHEMA, "provenance": provenance(command()),
        "case": {"base": a.base, "guide": a.guide, "weights": "seeded random numbers", "options": options},
        "steps": {"distill guidance": run(["distill", "guidance", *place, *options])},
    }  # fmt: skip


def command() -> list[str]:
    """Return this command line."""
    return ["python", "-m", "benchmarks.realsize", *sys.argv[1:]]


def main(arguments: list[str] | None = None) -> None:
    """Write one record, unless it exists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.realsize", description=__doc__)
    parser.add_argument("--base", default="random:sd15")
    parser.add_argument("--guide", default="tiny")
    parser.add_argument("--part", choices=("build", "run", "train"), default="build")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--target", default="sm_89", help="target of the engine; 'any' for onnxruntime")
    parser.add_argument("--profile", action="append", help="batch sizes; default b1 for an engine")
    parser.add_argument("--guided-only", action="store_true", help="with --part run: verify instead of images and CFG")
    parser.add_argument("--work", type=Path, default=Path("build/realsize"), help="folder for engines")
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/realsize-….json")
    parser.add_argument("--again", action="store_true", help="measure again even if the record exists")
    a = parser.parse_args(arguments)
    base = a.base.removeprefix("random:").replace("/", "-")
    words = [a.precision, a.target] if a.part == "build" else [a.part]
    name = "-".join(["realsize", base, a.guide, *words])
    out = a.out or RESULTS / f"{name}.json"
    if out.is_file() and not a.again:
        print(f"{out} exists; use --again to measure it again")
        return
    work = a.work / name
    if a.again or a.part == "build":  # a build cannot be continued
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    result = {"build": build, "run": runs, "train": train}[a.part](a, work)
    write_json(out, result)
    shutil.rmtree(work)
    print(f"{out} is written")


if __name__ == "__main__":
    main()

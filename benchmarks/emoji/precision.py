"""Measure precisions on the bundled model: parity, size and build time of every bundle, and quality of its images.

Three parts, each written as soon as it is complete, so that a killed run continues:

- bundles: fp32, fp16, int8, int8-weights and fp8 for ONNX Runtime; the same without fp32 as TensorRT-RTX engines for
  four GPUs, compiled but not run.
- images: 512 of each precision from the same noise; EfficientNet-KID and alignment, and paired differences from fp32
  with intervals.  float16 is run with every result rounded to float16, as on a GPU; ONNX Runtime's CPU provider would
  compute in float32.
- speed: one U-Net evaluation on ONNX Runtime's CPU provider, interleaved, as ratios to fp32.

    python -m benchmarks.emoji.precision            # benchmarks/results/emoji-precision.json
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.backends.base import Size
from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.build.builder import build
from pnp_trt.build.parity import rounded_at_every_node
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.store import open_bundle, read_manifest, write_json
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.verify import load_golden
from pnp_trt.sampling.network import Bound, Description, Network

from ..records import add_images_option, read
from . import compare
from .compare import Ranked
from .measures import Shots, real_images
from .provenance import machine
from .runner import captions

SCHEMA = "pnp-trt/emoji-precision/2"
TARGETS = ("sm_75", "sm_86", "sm_89", "sm_120")
BATCH = 16
#: keys of a manifest's INT8 section that are recorded
TOLD = ("layers", "share_of_macs", "latent_error", "decision", "kept")


def specs(home: Path, guide: str) -> list[BuildSpec]:
    """Specs of all bundles; folders are named after backend, recipe and target."""
    ort = [("onnxruntime", p, None) for p in ("fp32", "fp16", "int8", "int8-weights", "fp8")]
    rtx = [("tensorrt-rtx", p, t) for p in ("fp16", "int8", "int8-weights") for t in TARGETS]
    rtx += [("tensorrt-rtx", "fp8", t) for t in TARGETS if int(t.removeprefix("sm_")) >= 89]
    return [
        BuildSpec("emoji", guide, b, p, home / "-".join(filter(None, [b, p, t])), t, () if t is None else ("b1",))
        for b, p, t in (*ort, *rtx)
    ]  # fmt: skip


def bundle_row(folder: Path) -> dict[str, Any]:
    """Parity, sizes, times and memory of a bundle, from its manifest."""
    m = read_manifest(folder)
    unet = m.networks["unet"]
    size = {k: sum(f.size for n, f in m.files.items() if n.startswith(k)) for k in ("unet.onnx", "unet.engine")}
    return {
        "backend": m.backend, "precision": m.precision, "target": m.target,
        "parity": dict(m.parity.relative_error),
        "parity_limits": {k: n.parity.limit for k, n in m.networks.items()},
        "unet_graph_bytes": size["unet.onnx"], "unet_engine_bytes": size["unet.engine"] or None,
        "int8": {k: v for k, v in (unet.quantised.to_json() if unet.quantised else {}).items() if k in TOLD} or None,
        "build_seconds": m.build_seconds, "unet_compile_seconds": unet.compiled.seconds,
        "peak_memory_bytes": m.peak_memory.to_json(),
    }  # fmt: skip


class AsWritten(Network):
    """A half-precision graph with every result rounded to its type, on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # keeps the graph's casts
        rounded_graph = rounded_at_every_node(path)
        assert rounded_graph is not None
        try:
            self._session = ort.InferenceSession(str(rounded_graph), options, providers=["CPUExecutionProvider"])
        finally:
            rounded_graph.unlink()

    def describe(self) -> Description:
        return Description({}, {}, "cpu")

    @contextlib.contextmanager
    def bind(self, batch: int, size: Size | None = None) -> Iterator[Bound]:
        yield _Held(self._session)


class _Held(Bound):
    def __init__(self, session: Any) -> None:
        self._session, self._inputs, self._out = session, {}, np.empty(0)

    def write(self, **inputs: np.ndarray) -> None:
        # copied, because the loop overwrites its inputs in place
        self._inputs |= {name: np.array(value) for name, value in inputs.items()}

    def run(self) -> None:
        self._out = self._session.run(None, self._inputs)[0]

    def read(self) -> np.ndarray:
        return self._out


def sample(folder: Path, rows: Any, steps: int | None, w: float, as_written: bool, tell: Any) -> np.ndarray:
    """Images uint8 ``[N, H, W, 3]`` of one bundle."""
    bundle = open_bundle(folder)
    pipeline = Pipeline(bundle, provider="cpu")
    if as_written:
        pipeline._unet, pipeline._vae = (AsWritten(bundle.file(n)) for n in ("unet", "vae_decoder"))
        pipeline._text.networks = {name: AsWritten(bundle.file(name)) for name in pipeline._text.networks}
    out = []
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        generated = pipeline([a.prompt for a in part], seed=[a.seed for a in part], steps=steps, guidance=w)
        out += [p.pixels for p in generated]
        tell(len(out))
    return np.stack(out)


def speed(home: Path, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one evaluation, interleaved by round, and the ratio to fp32 in the same round."""
    names = ("fp32", "fp16", "int8", "int8-weights", "fp8")
    rows = []
    for batch in (1, 4):
        nets, times = {}, {n: [] for n in names}
        for n in names:
            bundle = open_bundle(home / f"onnxruntime-{n}")
            nets[n] = Pipeline(bundle, provider="cpu")._unet
        golden, _ = load_golden(home / "onnxruntime-fp32" / "golden.npz")["unet"]
        inputs = {k: np.concatenate([v] * batch)[:batch] for k, v in golden.items()}
        for turn in range(rounds + 3):
            for n in names:
                start = time.perf_counter()
                nets[n](**inputs)
                if turn >= 3:
                    times[n].append(1e3 * (time.perf_counter() - start))
        for n in names:
            ratio = np.array(times[n]) / np.array(times["fp32"])
            rows.append(
                {
                    "precision": n, "batch": batch, "p50_ms": round(float(np.median(times[n])), 3),
                    "ratio_to_fp32": [round(float(np.quantile(ratio, q)), 3) for q in (0.25, 0.5, 0.75)],
                    "observations_ms": [round(t, 3) for t in times[n]],
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.precision", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--guide", default="emoji-tiny")
    add_images_option(parser, 512)
    add("--steps", type=int, default=16)
    add("--guidance", type=float, default=3.0)
    add("--rounds", type=int, default=30)
    add("--parts", default="bundles,images,speed")
    add("--cache", type=Path, default=Path("build/emoji"))
    add("--judge", type=Path, default=Path("pnp_trt/assets/judge.safetensors"))
    add("--json", type=Path, default=Path("benchmarks/results/emoji-precision.json"))
    a = parser.parse_args()
    home = a.cache / "precision"
    document: dict[str, Any] = read(a.json) if a.json.is_file() else {}
    document |= {
        "schema": SCHEMA,
        "provenance": machine(shlex.join(["python", "-m", "benchmarks.emoji.precision", *sys.argv[1:]])),
    }
    parts = a.parts.split(",")
    for spec in specs(home, a.guide):
        if "bundles" in parts or spec.backend == "onnxruntime":
            print(f"build {spec.folder().name}", file=sys.stderr)
            build(spec)
    if "bundles" in parts:
        document["bundles"] = [bundle_row(s.folder()) for s in specs(home, a.guide)]
        write_json(a.json, document)
    if "images" in parts:
        document["images"] = judged(a, home)
        write_json(a.json, document)
    if "speed" in parts:
        document["speed"] = {"device": "ONNX Runtime's CPU provider", "rows": speed(home, a.rounds)}
        write_json(a.json, document)


def judged(a: argparse.Namespace, home: Path) -> dict[str, Any]:
    """KID and alignment of every precision's images, and their distance from and gain over fp32's."""
    rows = captions("train", a.images)
    concepts = [r.concept for r in rows]
    extract, head = FeatureExtractor(), AlignmentHead.load(a.judge)
    real = Shots.cached(home / f"real-{a.images}.npz", lambda: real_images(rows, a.cache), extract)
    sets: dict[str, Ranked] = {}
    for name in ("fp32", "fp16", "int8", "int8-weights", "fp8"):
        folder = home / f"onnxruntime-{name}"
        key = read_manifest(folder).key[:12]

        def tell(done: int, name: str = name) -> None:
            print(f"{name}: {done} of {a.images} images", file=sys.stderr)

        shots = Shots.cached(
            home / f"images-{key}-{a.steps}-{a.guidance:g}-{a.images}.npz",
            lambda folder=folder, name=name, tell=tell: sample(  # type: ignore[misc]
                folder, rows, a.steps, a.guidance, name == "fp16", tell
            ),
            extract,
        )
        sets[name] = Ranked.of(shots, concepts, head)
    return {
        "guide": a.guide, "steps": a.steps, "w": a.guidance, "count": a.images,
        "fp16_is": "every result rounded to float16, on the CPU",
        "rows": [_row(real, n, s, sets["fp32"]) for n, s in sets.items()],
    }  # fmt: skip


def _row(real: Shots, name: str, mine: Ranked, fp32: Ranked) -> Mapping[str, Any]:
    out = {"precision": name, **compare.quality(real, [mine])}
    if name != "fp32":
        out |= {
            "gain_over_fp32": compare.gain(real, [fp32], [mine]),
            "distance_to_fp32": compare.distance([mine], [fp32]),
        }
    return out


if __name__ == "__main__":
    main()

"""A fake results document of a long run: several engines, methods, batch sizes, steps and w, with images.

The figures are random from a seed but consistent: methods of a round share the machine's slow moments, and ratios are
computed from the rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pnp_trt.bench import results
from pnp_trt.bench.measure import queues
from pnp_trt.bench.measure.latency import BOUNDARY

COST: list[dict[str, Any]] = [
    dict(network="teacher", per="step", parameters=859_520_964, macs=401_640_000_000,
         macs_without_attention=338_610_000_000),
    dict(network="guide-tiny", per="step", parameters=1_377_008, macs=7_900_000_000,
         macs_without_attention=7_500_000_000),
    dict(network="guide-full", per="step", parameters=361_279_120, macs=137_900_000_000,
         macs_without_attention=116_420_000_000),
    dict(network="text-encoder", per="image", parameters=123_060_480, macs=6_785_000_000,
         macs_without_attention=6_545_000_000),
    dict(network="vae-decoder", per="image", parameters=49_490_199, macs=1_242_000_000_000,
         macs_without_attention=1_240_000_000_000),
]  # fmt: skip
#: engine, backend, precision, and the relative time of a U-Net evaluation
ENGINES = (
    ("emoji-teacher", "onnxruntime", "fp32", 1.0),
    ("emoji-tiny", "onnxruntime", "fp32", 1.0),
    ("emoji-tiny-fp16-rtx-sm_89", "tensorrt-rtx", "fp16", 0.45),
)
#: method, U-Net evaluations per step, and its additional work
METHODS = {
    "emoji-teacher": (("cfg", 2, 0.0), ("cfg-two-passes", 2, 0.06), ("cfg-interval", 1.6, 0.0),
                      ("cfg-fewer-steps", 1, 0.0), ("unguided", 1, 0.0), ("diffusers", 2, 0.35),
                      ("diffusers-compile", 2, 0.15)),
    "emoji-tiny": (("guided", 1, 0.05),),
    "emoji-tiny-fp16-rtx-sm_89": (("guided", 1, 0.07),),
}  # fmt: skip
STEPS = (50, 20, 8)
SCALES = (2.0, 3.0, 5.0, 8.0)
PROMPTS = ("red apple", "red heart", "automobile", "tulip", "house", "cactus", "ghost", "mushroom")


def make(
    *,
    seed: int = 0,
    slow: dict[str, float] | None = None,
    batches: tuple[int, ...] = (1, 4, 8),
    rounds: int = 12,
    quality: bool = True,
    kid_worse: float = 0.0,
    **change: Any,
) -> dict[str, Any]:
    """Return the document.

    slow: factor on the time of a method, by its name.  quality: include KID and alignment.  kid_worse: added to the KID
    of every guided row.  change: arguments of `results.document` to override.
    """  # fmt: skip
    values: dict[str, Any] = {
        "settings": {"suite": "full", "quick": False, "base": "emoji", "steps": 20, "rounds": rounds},
        "cost": COST,
        "methods_cost": methods_cost(),
        "published": published(),
        "engines": engines(),
        "device": {"name": "Intel(R) Xeon(R) Processor", "peak_macs_per_s": 61.3e9, "peak_bytes_per_s": 11.8e9,
                   "how": "a matrix product of 2048 x 2048 and a copy of 256 MiB, best of 10"},
        "latency": [
            *latency(np.random.default_rng(seed), slow or {}, batches, rounds),
            *latency(np.random.default_rng(seed + 1000), slow or {}, batches, rounds, timed=8),
        ],
        "cold_start": cold_start(np.random.default_rng(seed)),
        "serving": [serving()],
        "fidelity": fidelity(quality, kid_worse),
        "images": images(),
        "left_out": [{"what": "energy per image", "why": "no NVIDIA GPU is here"},
                     {"what": "optimum-onnx", "why": "optimum is not installed; pip install optimum[onnxruntime]"}],
        "task_quality_reason": None if quality else "--quick skips the images that KID needs",
    }  # fmt: skip
    return results.document(["pnp-trt", "bench", "--suite", "full", "--json", "my bench.json"], **(values | change))


def methods_cost() -> list[dict[str, Any]]:
    teacher, once = COST[0], COST[3]["macs"] + COST[4]["macs"]
    rows = []
    for method, guide, steps, evaluations in (
        ("cfg", None, 20, 40), ("cfg-two-passes", None, 20, 40), ("cfg-interval", None, 20, 32),
        ("cfg-fewer-steps", None, 10, 20), ("unguided", None, 20, 20),
        ("guided", "guide-tiny", 20, 20), ("guided", "guide-full", 20, 20),
    ):  # fmt: skip
        row: dict[str, Any] = {
            "method": method, "guide": guide, "steps": steps, "evaluations": evaluations,
            "networks": ["teacher"] * (2 if evaluations > steps else 1) + ([guide] if guide else []),
            "image_includes": ["text-encoder", "vae-decoder"],
        }  # fmt: skip
        beside = next((one for one in COST if one["network"] == guide), None)
        for suffix in ("", "_without_attention"):
            key = "macs" + suffix
            loop = evaluations * teacher[key] + steps * (beside[key] if beside else 0)
            row["macs_per_step" + suffix] = loop // steps
            row["macs_per_image" + suffix] = loop + once
            row["ratio_to_cfg" + suffix] = loop / (40 * teacher[key])
        rows.append(row)
    return rows


def latency(
    rng: np.random.Generator, slow: dict[str, float], batches: tuple[int, ...], rounds: int, timed: int = 20
) -> list[dict]:
    rows = []
    for batch in batches:
        moments = 1 + 0.25 * rng.random(rounds) ** 4  # the machine's other load, the same for all methods of a round
        cfg: np.ndarray | None = None
        for engine, _, _, speed in ENGINES:
            for method, evaluations, extra in METHODS[engine]:
                per_pass = speed * (3.0 + 6.6 * batch)
                steps = timed // 2 if method == "cfg-fewer-steps" else timed
                median = steps * (per_pass * evaluations * (0.5 + 0.5 * min(evaluations, 1)) + per_pass * extra)
                loops = slow.get(method, 1.0) * median * moments * (1 + 0.01 * rng.random(rounds))
                cfg = loops if method == "cfg" else cfg
                assert cfg is not None
                rows.append(latency_row(engine, method, batch, steps, loops, cfg, evaluations))
    return rows


def latency_row(engine, method, batch, steps, loops, cfg, evaluations) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    ratios = np.sort(loops / cfg)
    p25, p50, p75, p90, p99 = (float(one) for one in np.percentile(loops, [25, 50, 75, 90, 99]))
    peer = method.startswith("diffusers")
    least = None if peer else 0.55 * p50 if batch > 1 else 0.4 * p50
    return {
        "engine": engine, "method": method, "batch": batch, "steps": steps, "guidance": 3.0,
        "guided_interval": [67, 628] if method == "cfg-interval" else None, "evaluations": evaluations * steps,
        "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "p50_ms_per_step": p50 / steps,
        "p50_ms_per_image": (p50 + 12 * batch) / batch, "images_per_s": 1e3 * batch / (p50 + 12 * batch),
        "spread": (p75 - p25) / p50, "encode_p50_ms": 2.6 * batch, "decode_p50_ms": 9.1 * batch,
        "peak_memory_bytes": 512 * 2**20 + batch * 2**25, "energy_j_per_image": None,
        "least_ms": least, "share_of_least": None if least is None else least / p50,
        "ratio_to_cfg": float(np.median(ratios)),
        "ratio_to_cfg_interval": [float(ratios[len(ratios) // 5]), float(ratios[-1 - len(ratios) // 5])],
        "ratio_reference": "emoji-teacher/cfg", "rounds": len(loops), "warmup": 2, "boundary": BOUNDARY,
        "raw": [{"round": i, "position": 0, "encode_ms": 2.6 * batch, "loop_ms": float(one), "decode_ms": 9.1 * batch}
                for i, one in enumerate(loops)],
    }  # fmt: skip


def fidelity(quality: bool = True, kid_worse: float = 0.0) -> list[dict[str, Any]]:
    rows = []
    for engine, method, evaluations in (
        ("emoji-teacher", "cfg", 2), ("emoji-teacher", "cfg-interval", 1.6), ("emoji-teacher", "cfg-fewer-steps", 2),
        ("emoji-teacher", "unguided", 1), ("emoji-tiny", "guided", 1),
    ):  # fmt: skip
        for asked in STEPS:
            steps = asked // 2 if method == "cfg-fewer-steps" else asked
            for w in SCALES:
                plain = method == "unguided"
                kid = 0.06 + 0.1 / (1 if plain else w) + 0.16 / steps + (0.007 + kid_worse) * (method == "guided")
                kid += 0.004 * (method == "cfg-interval")
                row: dict[str, Any] = {
                    "engine": engine, "method": method, "steps": steps, "guidance": w,
                    "evaluations": evaluations * steps, "images": 512,
                    "macs_per_image": int(evaluations * steps * 662_724_608) + 592_313_088,
                }  # fmt: skip
                if quality:
                    row |= {"kid": estimate(kid, 0.006, 512), "r_at_1": estimate(0.28 - kid, 0.03, 512),
                            "r_at_5": estimate(0.5 - kid, 0.04, 512),
                            "kid_gain_over_cfg": None if method == "cfg" and steps == 50
                            else estimate(-0.16 / steps - 0.004, 0.002, 512)}  # fmt: skip
                if method != "cfg" or steps != 50:
                    row["psnr_to_cfg_db"] = estimate(15 + 6 * (method == "guided") - 12 / steps + w / 4, 0.5, 512)
                    row["feature_cosine_to_cfg"] = estimate(0.9 - 0.3 / steps, 0.01, 512)
                rows.append(row)
    return rows


def estimate(value: float, half: float, count: int) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + 1.1 * half, "count": count}


def published() -> list[dict[str, Any]]:
    figures = (("teacher, per step", 338.7, 338.61), ("teacher + full guide, per step", 455.2, 455.03),
               ("CFG, per step", 677.5, 677.22))  # fmt: skip
    rows = [
        {"what": what, "published": printed, "published_unit_printed": "TFLOPs", "counted": counted,
         "unit": "GMACs without attention", "relative_difference": counted / printed - 1, "note": None}
        for what, printed, counted in figures
    ]  # fmt: skip
    return [*rows, {"what": "tiny guide", "published": 8.27, "published_unit_printed": "M", "counted": None,
                    "unit": "M parameters", "relative_difference": None,
                    "note": "the paper does not publish its tiny guide; ours has 1.38 M"}]  # fmt: skip


def engines() -> list[dict[str, Any]]:
    return [
        {"engine": engine, "backend": backend, "precision": precision, "target": "cpu" if speed == 1 else "sm_89",
         "network": network, "file_bytes": int(size * speed), "graph_bytes": size, "device_memory_bytes": None,
         "layers": None if speed == 1 else 214, "reformats": None if speed == 1 else 3, "note": None}
        for engine, backend, precision, speed in ENGINES
        for network, size in (("unet", 27_400_000), ("text_encoder", 27_700_000), ("vae_decoder", 1_900_000))
    ]  # fmt: skip


def cold_start(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for engine, _, _, speed in ENGINES:
        seconds = sorted(0.7 + (1 - speed) + 0.05 * rng.random(4))
        rows.append({"engine": engine, "seconds": seconds, "p50_s": float(np.median(seconds)), "imports_s": 0.21,
                     "boundary": "process start to the first image's pixels, files in the page cache"})  # fmt: skip
    return rows


def serving() -> dict[str, Any]:
    """Queues on a device that is two thirds idle at batch 1."""
    calls = {n: 0.008 + 0.004 * n for n in (1, 2, 4, 8)}
    costs = queues.Costs(calls, calls, 0.003, 0.01)
    steps = (8, 20, 50)
    rates = queues.capacity(costs, 60, steps, queues.POLICIES)
    return {
        "engine": "emoji-tiny", "slots": 8, "rounds": 12, "requests": 60, "burst": queues.BURST, "steps": list(steps),
        "guidance": [3.0, 2.0, 5.0], "boundary": BOUNDARY, "text_s": 0.003, "decode_s": 0.01,
        "calls": [{"batch": n, "whole_s": s, "step_s": s} for n, s in calls.items()], "capacity_per_s": rates,
        "queues": queues.rows(costs, 60, steps, queues.POLICIES, rates),
    }  # fmt: skip


def images() -> dict[str, Any]:
    """Images of two plain discs per prompt: small files that differ."""
    y, x = np.mgrid[:64, :64]
    rows = []
    for method, steps, w in (("cfg", 50, 3.0), ("guided", 50, 3.0), ("guided", 8, 3.0), ("guided", 50, 8.0)):
        stack = np.full((len(PROMPTS), 64, 64, 3), 255, np.uint8)
        for i in range(len(PROMPTS)):
            disc = (x - 32) ** 2 + (y - 32) ** 2 < (18 + i + steps / 10) ** 2
            stack[i][disc] = (40 + 24 * i, 200 - 20 * i, int(20 * w))
        label = f"{'teacher, CFG' if method == 'cfg' else 'guided'}\n{steps} steps, w = {w:g}"
        rows.append({"label": label, "engine": "emoji-tiny", "method": method, "steps": steps, "guidance": w,
                     "pixels": stack})  # fmt: skip
    return {"columns": list(PROMPTS), "rows": results.encode_images(rows), "caption": "noto style, DDIM."}

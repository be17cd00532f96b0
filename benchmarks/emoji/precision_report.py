# ruff: noqa: E501  (rows of a table cannot be wrapped)
"""Write docs/precision.md from the record emoji-precision.json: ``python -m benchmarks.emoji.precision_report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..records import read

RESULTS = Path("benchmarks/results/emoji-precision.json")
OUT = Path("docs/precision.md")
HEAD = """# Precision: FP32, FP16, BF16, INT8

A recipe is chosen with `pnp-trt build --precision NAME`. Types are stored only in the graph, so a recipe means the
same on every backend. Every network is compared with PyTorch in float32 before a bundle is written.

| recipe | weights and arithmetic | limit of the relative error |
| --- | --- | ---: |
| `fp32` | float32; TF32 is off | 1e-4 |
| `fp16` | float16, with sinusoids and the statistics of norms in float32. If float16's error is too large, the VAE decoder falls back to bfloat16 (sm_80 and newer), then to float32 (TensorFloat-32 on TensorRT), and the manifest records it | 5e-3 |
| `bf16` | bfloat16, with the same exceptions (TensorRT) | 4e-2 |
| `int8` | W8A8 in the U-Net layers that the calibration record selects: symmetric, with explicit Q/DQ, one scale per output channel of a weight and one per input. The rest is float16 (float32 on ONNX Runtime, whose CPU provider has no float16 kernels). On TensorRT-RTX a weight has a single scale, the form that it fuses with bias and residual, and the projections into and out of transformer blocks and after attention stay in floating point, because they lose their fused kernels in 8 bits | 1e-1 |
| `int8-weights` | the weights of the U-Net and the guide are stored in INT8 and computed in float16; no calibration record is needed. Files are smaller and steps slower: TensorRT-RTX converts every weight in a separate kernel | 5e-2 |
| `fp8` | W8A8 in E4M3 in the layers that the same record selects, except the projections named above: one scale per input and one per weight, which TensorRT-RTX fuses with the bias. Needs sm_89 or newer; ONNX Runtime rounds to E4M3 and computes in float32 | 1e-1 |

## Calibration

    pnp-trt calibrate --base emoji                 # writes calibration/emoji-tiny.int8.json
    pnp-trt build --base emoji --precision int8    # uses this record
    pnp-trt build --base emoji --precision fp8 --backend tensorrt-rtx --target sm_89    # the same record

`calibrate` generates images of `calibration/emoji-prompts.txt` (or of your `--prompts`) in PyTorch with the guide, at all
timesteps and at guidance scales from 1 to 9. It records the inputs of every convolution and linear layer: the largest
value, three percentiles (NVIDIA Model Optimizer's histograms), the largest value in each tenth of the timesteps, and for
linear layers the largest value of each channel. Then it measures the prediction's error in a sweep: with all layers of a
kind in INT8, by each method (SmoothQuant's factors are powers of two, so that scaling by them adds no rounding); with each
layer alone in INT8; and with more and more of the most sensitive layers left in floating point, until the error on states
that were not used for calibration is below `--limit`. The record has one readable line for each layer. It is for
one base and one guide; a build refuses it for any other. An interrupted run continues, and a different `--limit` is
applied to the record in seconds.

The tiny guide stays in floating point: it has a fiftieth of the arithmetic and provides all of the guidance. A full
guide is quantised with the U-Net, except for the part that runs once per image. `--layer PATTERN` selects other layers.
`--probes 0` skips the sweep, for machines on which it would take hours. The layers whose inputs are not normalised
(shortcuts, downsamplers and upsamplers) then stay in floating point.
"""


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(v: dict[str, Any], digits: int = 3) -> str:
    return f"{v['value']:.{digits}f} ({v['low']:.{digits}f} … {v['high']:.{digits}f})"


def signed(v: dict[str, Any], digits: int = 3) -> str:
    return f"{v['value']:+.{digits}f} ({v['low']:+.{digits}f} … {v['high']:+.{digits}f})"


def bundles(rows: list[dict[str, Any]]) -> list[str]:
    out = [
        "",
        "## Bundles of the bundled model",
        "",
        "The RTX engines were compiled on a machine without a GPU and have not been run.",
        "",
    ]
    out += ["| backend | recipe | target | U-Net parity | graph, MiB | engine, MiB | build, s | U-Net compiled in, s |"]
    out += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for r in rows:
        engine = f"{r['unet_engine_bytes'] / 2**20:.1f}" if r["unet_engine_bytes"] else ""
        seconds = f"{r['unet_compile_seconds']:.1f}" if r["unet_engine_bytes"] else ""
        out.append(
            f"| {r['backend']} | {r['precision']} | {r['target']} | {r['parity']['unet']:.1e} | "
            f"{r['unet_graph_bytes'] / 2**20:.1f} | {engine} | {r['build_seconds']:.0f} | {seconds} |"
        )
    int8_record = next((r["int8"] for r in rows if r["precision"] == "int8"), None)
    if int8_record:
        out += [
            "", f"`int8` quantises {int8_record['layers']} layers, which have {percent(int8_record['share_of_macs'])} of the U-Net's arithmetic. "
            f"The table has the error by the number of layers left in floating point, from the record's sweep; the selected row is bold.", "",
            "| layers left in floating point | arithmetic in INT8 | error of the prediction |", "| ---: | ---: | ---: |",
        ]  # fmt: skip
        chosen = len(int8_record["decision"]["float"])
        for k in int8_record["kept"]:
            cells = [str(k["kept"]), percent(k["int8_macs"]), f"{100 * k['error']:.2f} %"]
            out.append("| " + " | ".join(f"**{c}**" if k["kept"] == chosen else c for c in cells) + " |")
        out += [
            "",
            f"With this selection, the final latents differ by {percent(int8_record['latent_error'])} from those without quantisation.",
        ]
    return out


def images(p: dict[str, Any]) -> list[str]:
    out = ["", "## Images", ""]
    out += [
        f"{p['count']} images of `{p['guide']}` at {p['steps']} steps, w = {p['w']:g}, from the same noise; 95 % intervals. "
        f"FP16 is emulated: {p['fp16_is']}. Gains are paired; above 0 is better than FP32.", "",
        "| recipe | EfficientNet-KID | R@1 | gain in KID over FP32 | gain in R@1 | PSNR to FP32's, dB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in p["rows"]:
        gain, distance = r.get("gain_over_fp32"), r.get("distance_to_fp32")
        tail = ["", "", ""]
        if gain and distance:
            tail = [signed(gain["kid"], 4), signed(gain["R@1"]), interval(distance["psnr_db"], 1)]
        out.append("| " + " | ".join([r["precision"], interval(r["kid"]), interval(r["R@1"]), *tail]) + " |")
    for r in p["rows"]:
        if gain := r.get("gain_over_fp32"):
            inside = gain["kid"]["low"] <= 0 <= gain["kid"]["high"]
            out += [""] * (out[-1][:1] != "-")
            out += [f"- {r['precision']}: KID changes by {-gain['kid']['value']:+.4f}, "
                    + ("and the interval of the change contains 0." if inside else "and the interval of the change excludes 0.")]  # fmt: skip
    return out


def speed(s: dict[str, Any]) -> list[str]:
    out = [
        "",
        "## Speed on a CPU",
        "",
        "The time of one U-Net evaluation on ONNX Runtime's CPU provider as a ratio to FP32, in interleaved rounds: median (quartiles).",
        "",
    ]
    out += ["| recipe | batch | ratio |", "| --- | ---: | ---: |"]
    for r in s["rows"]:
        low, mid, high = r["ratio_to_fp32"]
        out.append(f"| {r['precision']} | {r['batch']} | {mid:.2f} ({low:.2f} … {high:.2f}) |")
    out += [
        "", "INT8 is slower on the CPU: ONNX Runtime fuses a quantised convolution only where its output is quantised too, and "
        "these graphs leave outputs in floating point, as TensorRT requires. **INT8 is not recommended on a CPU.** Whether "
        "it is faster than FP16 on a GPU was not measured; measure it with `pnp-trt bench` on the GPU.",
    ]  # fmt: skip
    return out


def main() -> None:
    document = read(RESULTS)
    lines = [HEAD.rstrip()]
    for name, part in (("bundles", bundles), ("images", images), ("speed", speed)):
        lines += part(document[name]) if name in document else []
    p = document["provenance"]
    lines += ["", f"Written by `python -m benchmarks.emoji.precision_report` from `benchmarks/results/{RESULTS.name}`, which was made by "
              f"`make precision` (its last part by `{p['command']}`) on {p['date'][:10]} "
              f"({p['device']['processor']}).", ""]  # fmt: skip
    OUT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()

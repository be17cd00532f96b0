"""Write docs/real-size.md from the records of ``make realsize``: ``python -m benchmarks.realsize_report``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pnp_trt.bundle.store import write_text

from .realsize import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "real-size.md"
#: common names of the architectures, in the order of the tables
TITLES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "SDXL"}
STEPS = ("guided", "unguided", "CFG", "diffusers CFG")
STEP_RATIOS = ("guided / unguided", "guided / CFG", "CFG / diffusers CFG")
HEAD = """# Real sizes

Time, memory and file sizes of models of real size on a CPU with two cores, measured by `make realsize`. Weights are
seeded random numbers: time and memory are those of real weights, but images would be noise. Each command runs in a
separate process, whose peak memory is given. TensorRT-RTX engines are compiled without a GPU and have not been run.

"Load" is the machine's one-minute load average at the end of a measurement, and "cores" is the number of cores that the
command could use. With a load above 2, or with one core, times are longer than on an idle machine.
"""


def rows(part: str) -> list[dict[str, Any]]:
    """The records of a part, by size and then by name."""
    records = []
    for file in sorted(RESULTS.glob("realsize-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        own = "build" if "networks" in record else "train" if "distill guidance" in record["steps"] else "run"
        if own == part:
            records.append(record | {"size": record["case"]["base"].removeprefix("random:"), "file": file.name})
    return sorted(records, key=lambda r: (list(TITLES).index(r["size"]), r["file"]))


def gib(count: int | None) -> str:
    """Bytes as GiB."""
    return "–" if count is None else f"{count / 2**30:.1f}"


def machine(record: dict[str, Any]) -> list[str]:
    """Load and cores of a record."""
    p = record["provenance"]
    return [f"{p['load_average'][0]:.1f}", str(p["usable_cores"])]


def table(head: Sequence[str], cells: Iterable[Sequence[str]], words: int) -> list[str]:
    """A Markdown table whose first ``words`` columns are text."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return ["", *("| " + " | ".join(line) + " |" for line in (head, rule, *cells)), ""]


def builds() -> list[str]:
    """Section on exports and compilations."""
    cells = []
    for r in rows("build"):
        case, unet, peak = r["case"], r["networks"]["unet"], r["peak_memory_bytes"]
        engine = unet["engine_bytes"]
        cells.append([
            TITLES[r["size"]], case["guide"].removeprefix("random-"), case["backend"], case["precision"],
            f"{r['export_and_parity_seconds']:.0f}", f"{r['compile_seconds']:.0f}", gib(peak["export"]),
            gib(peak["compile"]), "–" if engine is None else f"{engine / 2**20:,.0f}", f"{unet['graph_parity']:.1e}",
            *machine(r),
        ])  # fmt: skip
    head = ["model", "guide", "backend", "recipe", "export, s", "compile, s", "export, GiB", "compiler, GiB",
            "U-Net engine, MiB", "U-Net parity", "load", "cores"]  # fmt: skip
    text = (
        "`pnp-trt build` with the target `sm_89` at batch 1. Export includes loading, PyTorch's reference and the "
        "comparison with it; memory is the peak of the export and of the compiler's process. `int8` is calibrated "
        "without a sweep."
    )
    return ["## Builds", "", text, *table(head, cells, 4)] if cells else []


def runs() -> list[str]:
    """Section on the commands of the part ``run``."""
    cells = []
    for r in rows("run"):
        for name, step in r["steps"].items():
            cells.append(
                [TITLES[r["size"]], name, f"{step['seconds']:.0f}", gib(step["peak_memory_bytes"]), *machine(r)]
            )
    text = (
        "ONNX Runtime's CPU provider, float16 graphs, tiny guide. A step is `pnp-trt sample --steps 1`: the whole "
        "process, including loading, text encoder and decoder. `plug` inserts a U-Net with other weights. `verify` "
        "runs the networks of the plugged engine on golden inputs."
    )
    head = ["model", "command", "seconds", "peak, GiB", "load", "cores"]
    return ["## Plug and sample", "", text, *table(head, cells, 2)] if cells else []


def training() -> list[str]:
    """Section on the commands of the part ``train``."""
    cells = [
        [TITLES[r["size"]], f"{(step := r['steps']['distill guidance'])['seconds']:.0f}",
         gib(step["peak_memory_bytes"]), *machine(r)]
        for r in rows("train")
    ]  # fmt: skip
    text = (
        "`pnp-trt distill guidance`: the teacher's predictions for one noised image, three optimiser steps of one "
        "state each with gradient checkpointing in the processor's own precision, and the check of the result."
    )
    head = ["model", "seconds", "peak, GiB", "load", "cores"]
    return ["## Three steps of distillation", "", text, *table(head, cells, 1)] if cells else []


def steps() -> list[str]:
    """Section on the records of ``cpu_steps``, the bundled model's first."""
    cells = []
    for name, title in {"emoji": "emoji (bundled)", **TITLES}.items():
        file = RESULTS / f"cpu-steps-{name}.json"
        if not file.is_file():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        for row in record["rows"]:
            seconds = [f"{1000 * statistics.median(row['seconds'][n]):,.0f}" for n in STEPS]
            ratios = [row["ratios"][n]["wall"] for n in STEP_RATIOS]
            formatted = [f"{r['time_ratio']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]" for r in ratios]
            cells.append([title, str(row["batch"]), *seconds, *formatted, str(record["threads"])])
    text = (
        "`python -m benchmarks.cpu_steps`: one step of the U-Net at its own image size in float32, on ONNX Runtime and "
        "in diffusers' eager PyTorch, in interleaved rounds. Times are medians; ratios are taken within a round and "
        "have 95 % intervals."
    )
    head = ["model", "batch", *(f"{n}, ms" for n in STEPS), *STEP_RATIOS, "threads"]
    return ["## One step on a CPU", "", text, *table(head, cells, 1)] if cells else []


def page() -> str:
    """The page's text."""
    lines = [HEAD.rstrip(), "", *builds(), *runs(), *steps(), *training()]
    lines += ["The records are `benchmarks/results/realsize-*.json` and `cpu-steps-*.json`; this page is written by "
              "`python -m benchmarks.realsize_report`."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    write_text(page(), PAGE)
    print(f"{PAGE.name} is written")


if __name__ == "__main__":
    main()

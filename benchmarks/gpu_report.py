"""Text summary of a record of ``benchmarks.gpu``, and its goals, met or missed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: parts of SD 1.5's size, by how the modules run
PARTS = {"eager": "torch-sd15", "compiled": "torch-sd15-compiled"}
TITLES = {
    "torch-sd15": "SD 1.5", "torch-sd15-compiled": "SD 1.5, compiled", "torch-sdxl": "SDXL",
    "torch-sdxl-compiled": "SDXL, compiled",
}  # fmt: skip


def goals(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals for SD 1.5's size, 512², float16, on an H100; each ``met``, ``missed`` or ``not measured``.

    The better figure of eager and compiled modules counts; ``by`` names the mode, None without a figure.
    """
    rows = {how: _figures(parts.get(part, {}).get("cases", {})) for how, part in PARTS.items()}

    def goal(what: str, sign: str, limit: float, figure: str) -> dict[str, Any]:
        return _goal(what, sign, limit, {how: row[figure] for how, row in rows.items()})

    return [
        goal("guided iterations a second, batch 1", ">=", 200, "rate"),
        goal("guided step over one conditional pass, batch 1", "<=", 1.03, "ratio"),
        goal("loop overhead over captured steps, guided, batch 1", "<", 0.01, "overhead"),
        goal("share of the measured matmul roof, guided, batch 4", ">=", 0.5, "share"),
    ]


def _figures(cases: dict[str, Any]) -> dict[str, float | None]:
    guided, unguided = (cases.get(f"{method}, batch 1", {}) for method in ("guided", "unguided"))
    steps = [case.get("step", {}).get("ms") for case in (guided, unguided)]
    return {
        "rate": guided.get("iterations_a_second"),
        "ratio": None if None in steps else round(steps[0] / steps[1], 4),
        "overhead": guided.get("loop_overhead"),
        "share": cases.get("guided, batch 4", {}).get("share_of_roof"),
    }


def _goal(what: str, sign: str, limit: float, figures: dict[str, float | None]) -> dict[str, Any]:
    known = {how: figure for how, figure in figures.items() if figure is not None}
    if not known:
        return {"goal": what, "wanted": f"{sign} {limit:g}", "found": None, "by": None, "state": "not measured"}
    by = (max if sign == ">=" else min)(known, key=lambda how: known[how])
    best = known[by]
    met = {">=": best >= limit, "<=": best <= limit, "<": best < limit}[sign]
    return {
        "goal": what, "wanted": f"{sign} {limit:g}", "found": best, "by": by, "state": "met" if met else "missed",
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """Short summary of a record."""
    return "\n".join(_lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    parts = document["parts"]
    yield ""
    yield f"{document['gpu']['name']}, {document['gpu']['sm']}"
    roof = parts.get("roof", {})
    if roof.get("ran"):
        figures = {"fp16_matmul_tflops": "fp16 TFLOP/s", "bf16_matmul_tflops": "bf16 TFLOP/s", "copy_gb_per_s": "GB/s"}
        yield "roof: " + ", ".join(f"{roof[k]} {unit}" for k, unit in figures.items() if k in roof)
    for name, title in TITLES.items():
        yield from _unet(title, parts.get(name, {}))
    for name, part in parts.items():
        for kind in ("guided", "CFG"):
            if row := part.get(kind):
                ms = row.get("step_ms", {})
                yield (
                    f"{name}, {kind}: {ms} ms a step, captured equals step by step: "
                    f"{row.get('captured_equals_step_by_step')}"
                )
        if not part.get("ran") or not part.get("complete", True):
            yield f"{name}: {'stopped' if part.get('ran') else 'not run'}: {part['why'][:160]}"
    for precision in ("fp32", "fp16"):
        for kind, row in parts.get("ort-bundled", {}).get(precision, {}).items():
            yield (
                f"ONNX Runtime, {precision}, {kind}: {row.get('step_ms')} ms a step, levels from the CPU's images "
                f"{row.get('levels_from_cpu')}, warned of: {row.get('warned') or 'nothing'}"
            )
    for name, result in parts.get("tests", {}).get("modules", {}).items():
        yield f"{name}: {result['said'][-1] if isinstance(result, dict) and result['said'] else result}"
    for goal in document["goals"]:
        by = f" ({goal['by']})" if goal["by"] else ""
        yield f"goal: {goal['goal']}: {goal['wanted']}, found {goal['found']}{by}: {goal['state']}"


def _unet(title: str, part: dict[str, Any]) -> Iterator[str]:
    """A table of the cases of one part of ``gpu_unet``."""
    if layouts := part.get("unguided_step_ms_by_layout"):
        yield "layouts, ms a step: " + ", ".join(f"{name} {ms}" for name, ms in layouts.items())
    if not (cases := part.get("cases")):
        return
    yield f"{title + ', ' + part['precision']:<24}{'ms/step':>9}{'it/s':>8}{'no graph':>9}{'overhead':>10}" + (
        f"{'of roof':>9}{'equal':>7}{'GiB':>7}{'J/image':>9}{'compile s':>10}"
    )
    for name, row in cases.items():
        if "failed" in row:
            yield f"{name:<24}failed: {row['failed']}"
            continue
        plain = row.get("loop_ms_step_by_step")
        gib = row.get("peak_memory_bytes", {}).get("reserved")
        yield (
            f"{name:<24}{_show(row.get('step', {}).get('ms'), 9)}{_show(row.get('iterations_a_second'), 8, 1)}"
            f"{_show(None if plain is None else plain / part['steps'], 9)}{_show(row.get('loop_overhead'), 10, 4)}"
            f"{_show(row.get('share_of_roof'), 9, 3)}{row.get('captured_equals_step_by_step')!s:>7}"
            f"{_show(None if gib is None else gib / 2**30, 7, 1)}{_show(row.get('joules_per_image'), 9, 1)}"
            f"{_show(row.get('compile', {}).get('seconds'), 10, 1)}"
        )


def _show(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}}"

"""What a record of ``benchmarks.gpu`` states, in lines; and the goals, met or missed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PART = "torch-sd15"


def goals(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals for SD 1.5's size, 512², float16, on an H100; each ``met``, ``missed`` or ``not measured``."""
    cases = parts.get(PART, {}).get("cases", {})
    guided, unguided = (cases.get(f"{method}, batch 1", {}) for method in ("guided", "unguided"))
    steps = [case.get("step", {}).get("ms") for case in (guided, unguided)]
    ratio = None if None in steps else round(steps[0] / steps[1], 4)
    return [
        _goal("guided iterations a second, batch 1", ">=", 200, guided.get("iterations_a_second")),
        _goal("guided step over one conditional pass, batch 1", "<=", 1.03, ratio),
        _goal("loop overhead over captured steps, guided, batch 1", "<", 0.01, guided.get("loop_overhead")),
        _goal(
            "share of the measured matmul roof, guided, batch 4", ">=", 0.5,
            cases.get("guided, batch 4", {}).get("share_of_roof"),
        ),
    ]  # fmt: skip


def _goal(what: str, sign: str, wanted: float, found: float | None) -> dict[str, Any]:
    state = "not measured"
    if found is not None:
        held = {">=": found >= wanted, "<=": found <= wanted, "<": found < wanted}[sign]
        state = "met" if held else "missed"
    return {"goal": what, "wanted": f"{sign} {wanted:g}", "found": found, "state": state}


def table(document: dict[str, Any]) -> str:
    """All that matters, short."""
    return "\n".join(_lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    parts = document["parts"]
    yield ""
    yield f"{document['gpu']['name']}, {document['gpu']['sm']}"
    roof = parts.get("roof", {})
    if roof.get("ran"):
        figures = {"fp16_matmul_tflops": "fp16 TFLOP/s", "bf16_matmul_tflops": "bf16 TFLOP/s", "copy_gb_per_s": "GB/s"}
        yield "roof: " + ", ".join(f"{roof[k]} {unit}" for k, unit in figures.items() if k in roof)
    sd15 = parts.get(PART, {})
    if layouts := sd15.get("unguided_step_ms_by_layout"):
        yield "layouts, ms a step: " + ", ".join(f"{name} {ms}" for name, ms in layouts.items())
    if cases := sd15.get("cases"):
        yield f"{'SD 1.5 size, ' + sd15['precision']:<22}{'ms/step':>9}{'it/s':>8}{'eager':>9}{'overhead':>10}" + (
            f"{'of roof':>9}{'equal':>7}{'GiB':>7}{'J/image':>9}"
        )
        for name, row in cases.items():
            if "failed" in row:
                yield f"{name:<22}failed: {row['failed']}"
                continue
            eager = row.get("loop_ms_step_by_step")
            gib = row.get("peak_memory_bytes", {}).get("reserved")
            yield (
                f"{name:<22}{_show(row.get('step', {}).get('ms'), 9)}{_show(row.get('iterations_a_second'), 8, 1)}"
                f"{_show(None if eager is None else eager / sd15['steps'], 9)}{_show(row.get('loop_overhead'), 10, 4)}"
                f"{_show(row.get('share_of_roof'), 9, 3)}{row.get('captured_equals_step_by_step')!s:>7}"
                f"{_show(None if gib is None else gib / 2**30, 7, 1)}{_show(row.get('joules_a_picture'), 9, 1)}"
            )
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
    for name, said in parts.get("tests", {}).get("modules", {}).items():
        yield f"{name}: {said['said'][-1] if isinstance(said, dict) and said['said'] else said}"
    for goal in document["goals"]:
        yield f"goal: {goal['goal']}: {goal['wanted']}, found {goal['found']}: {goal['state']}"


def _show(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}}"

"""The paper's cost table beside our own counts, with an explanation of its units.

Source: Hsiao et al., "Plug-and-Play Diffusion Distillation", CVPR 2024 (arXiv 2406.01954), the table of compute and
parameters of SD 1.5. It prints "FLOPs (trillion)", but the figures are giga-MACs without the attention products, as our
counts of the public architectures show. Sums of two printed figures are computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: Parameters of the SD 1.x U-Net, which the paper counted at 64 x 64 latents.
SD1_PARAMETERS = 859_520_964
COMPUTE, PARAMETERS = "GMACs without attention", "M parameters"
_PRINTED_COMPUTE, _PRINTED_PARAMETERS = "TFLOPs", "M"
_UNITS = "printed as tera-FLOPs; the figure is giga-MACs of convolutions and linear layers, attention products left out"


def published_rows(base: str, cost_rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the published figures of SD 1.x beside the counts of `cost.cost_rows`; empty for any other teacher.

    base: name of the counted base model, for the notes.  Each row has `what`, `published` with
    `published_unit_printed`, `counted` in `unit` (GMACs without attention, or M parameters), `relative_difference`
    (counted / published - 1; None if the two are not comparable, as the note explains) and `note`.
    Rows of a network that was not counted are left out.
    """
    rows = {str(row["network"]): row for row in cost_rows}
    teacher = rows.get("teacher")
    if teacher is None or teacher["parameters"] != SD1_PARAMETERS:
        return []
    step = _giga(teacher)
    published = [
        _row("teacher, per step", 338.7, step, COMPUTE, _UNITS),
        _row("teacher x 2 (CFG), per step", 677.5, 2 * step, COMPUTE, _UNITS),
        _row("teacher, parameters", 859, _millions(teacher), PARAMETERS, None),
    ]
    if full := rows.get("guide-full"):
        bundled = _giga(full)
        hint = _giga(rows["condition-full"]) if "condition-full" in rows else 0.0
        note = (
            f"the guide with its hint computed each step, as printed; bundles compute it once per image: {bundled:.2f}"
        )
        published += [
            _row("full guide, per step", 116.5, bundled + hint, COMPUTE, f"{_UNITS}; {note}"),
            _row("teacher + full guide, per step", 455.2, step + bundled + hint, COMPUTE, f"{_UNITS}; {note}"),
            _row("full guide, parameters", 361, _millions(full), PARAMETERS, "hint encoder included"),
        ]
    if tiny := rows.get("guide-tiny"):
        note = (
            f"not comparable: the paper's tiny guide is not published; counted is our own design for {base}, "
            "inside the paper's budget"
        )
        published += [
            _row("tiny guide, per step", 7.79, _giga(tiny), COMPUTE, note, alike=False),
            _row("teacher + tiny guide, per step", 346.49, step + _giga(tiny), COMPUTE, note, alike=False),
            _row("tiny guide, parameters", 8.27, _millions(tiny), PARAMETERS, note, alike=False),
        ]
    return published


def _row(
    what: str, published: float, counted: float, unit: str, note: str | None, *, alike: bool = True
) -> dict[str, Any]:
    return {
        "what": what,
        "published": published,
        "published_unit_printed": _PRINTED_COMPUTE if unit == COMPUTE else _PRINTED_PARAMETERS,
        "counted": round(counted, 3),
        "unit": unit,
        "relative_difference": counted / published - 1 if alike else None,
        "note": note,
    }


def _giga(row: Mapping[str, Any]) -> float:
    return float(row["macs_without_attention"]) / 1e9


def _millions(row: Mapping[str, Any]) -> float:
    return float(row["parameters"]) / 1e6

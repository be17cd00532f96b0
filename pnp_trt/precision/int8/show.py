"""Terminal output of a calibration record."""

from __future__ import annotations

from typing import Any

from .record import Record

LISTED = 8


def render(record: Record) -> Any:
    """Format the measurements and the decision of a record as rich tables."""
    from rich.console import Group
    from rich.table import Table

    sweep, decision = record.sweep, record.decision
    float_layers = decision["float"]
    head = (
        f"{len(record.layers)} layers observed on {record.settings['images']} images × {record.settings['steps']} "
        f"steps; {len(record.layers) - len(float_layers)} use INT8, {record.share():.1%} of their arithmetic"
    )
    if "methods" not in sweep:
        return head
    methods = Table(title="Error of the prediction with all layers of a kind in INT8", title_justify="left")
    names = list(dict.fromkeys(m for row in sweep["methods"].values() for m in row))
    methods.add_column("range by")
    for kind in sweep["methods"]:
        methods.add_column(kind, justify="right")
    for m in names:
        cells = [
            f"{row[m]:.2%}" + (" ←" if decision.get(kind) == m else "") if m in row else ""
            for kind, row in sweep["methods"].items()
        ]
        methods.add_row(m, *cells)
    curve = Table(title="Layers left in floating point, most sensitive first", title_justify="left")
    for name in ("layers", "INT8 arithmetic", "error"):
        curve.add_column(name, justify="right")
    for row in sweep["kept"]:
        mark = " ←" if row["kept"] == len(float_layers) else ""
        curve.add_row(str(row["kept"]), f"{row['int8_macs']:.1%}", f"{row['error']:.2%}{mark}")
    worst = Table(title="Layers with the largest error when only one layer is in INT8", title_justify="left")
    worst.add_column("layer", overflow="fold")
    worst.add_column("error", justify="right")
    for name, error in sorted(sweep["layers"].items(), key=lambda kv: -kv[1])[:LISTED]:
        worst.add_row(name + (" (stays)" if name in float_layers else ""), f"{error:.2%}")
    tail = f"latents after a whole run differ by {sweep['latent_error']:.1%}"
    return Group(head, methods, worst, curve, tail)

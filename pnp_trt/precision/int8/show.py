"""A calibration record in the terminal."""

from __future__ import annotations

from typing import Any

from .record import Record

LISTED = 8


def render(record: Record) -> Any:
    """What was measured and decided, as rich tables."""
    from rich.console import Group
    from rich.table import Table

    s, d = record.sweep, record.decision
    kept = d["float"]
    head = (
        f"{len(record.layers)} layers observed on {record.settings['images']} images × {record.settings['steps']} "
        f"steps; {len(record.layers) - len(kept)} take INT8, {record.share():.1%} of their arithmetic"
    )
    if "methods" not in s:
        return head
    methods = Table(title="Error of the prediction, all layers of a kind in INT8", title_justify="left")
    names = list(dict.fromkeys(m for row in s["methods"].values() for m in row))
    methods.add_column("range by")
    for kind in s["methods"]:
        methods.add_column(kind, justify="right")
    for m in names:
        cells = [
            f"{row[m]:.2%}" + (" ←" if d.get(kind) == m else "") if m in row else ""
            for kind, row in s["methods"].items()
        ]
        methods.add_row(m, *cells)
    curve = Table(title="Layers left in floating point, most sensitive first", title_justify="left")
    for name in ("layers", "INT8 arithmetic", "error"):
        curve.add_column(name, justify="right")
    for row in s["kept"]:
        mark = " ←" if row["kept"] == len(kept) else ""
        curve.add_row(str(row["kept"]), f"{row['int8_macs']:.1%}", f"{row['error']:.2%}{mark}")
    worst = Table(title="Layers that bring most error, alone in INT8", title_justify="left")
    worst.add_column("layer", overflow="fold")
    worst.add_column("error", justify="right")
    for name, error in sorted(s["layers"].items(), key=lambda kv: -kv[1])[:LISTED]:
        worst.add_row(name + (" (stays)" if name in kept else ""), f"{error:.2%}")
    tail = f"latents after a whole run differ by {s['latent_error']:.1%}"
    return Group(head, methods, worst, curve, tail)

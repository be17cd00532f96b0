"""Bundles as tables: what `pnp-trt inspect` and `pnp-trt list` print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import known_bundles, read_manifest
from .backends.profiles import Profile, legal_sizes
from .errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .export.layers import Layer


def rows(home: Path) -> list[dict[str, Any]]:
    """One entry a bundle: name, bytes, backend, precision, target, base, guide, built; or its ``problem``."""
    out: list[dict[str, Any]] = []
    for name in known_bundles(home):
        try:
            m = read_manifest(home / name)
        except InputError as e:
            out.append({"name": name, "problem": str(e)})
            continue
        out.append(
            {
                "name": name,
                "bytes": sum(f["bytes"] for f in m["files"].values()),
                "backend": m["backend"],
                "precision": m["precision"],
                "target": m["target"],
                "base": base_name(m),
                "guide": (m["guide"] or {}).get("name"),
                "built": m["built"],
            }
        )
    return out


def table(found: list[dict[str, Any]]) -> RenderableType:
    """The entries of ``rows`` for a terminal."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for title in ("engine", "size", "backend", "precision", "target", "base", "guide", "built"):
        out.add_column(title, justify="right" if title == "size" else "left")
    for row in found:
        if "problem" in row:
            out.add_row(row["name"], "", "damaged: see pnp-trt inspect")
        else:
            cells = [str(row[k] or "none") for k in ("backend", "precision", "target", "base", "guide", "built")]
            out.add_row(row["name"], _size(row["bytes"]), *cells)
    return out


def render(folder: Path, m: dict[str, Any], problem: str | None) -> RenderableType:
    """A manifest for a terminal.

    Args:
        problem: why the bundle cannot run here, if it cannot.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, pad_edge=False, show_header=False)
    total = sum(f["bytes"] for f in m["files"].values())
    guide = m["guide"]
    peak = {k: _size(v) for k, v in m["peak_memory"].items() if v}
    engine = m["parity"]["engine"]
    int8 = {k: n for k, n in m["networks"].items() if "int8" in n}
    built = [f"{m['built']} in {m['build_seconds']:g} s", *(f"peak memory {v} ({k})" for k, v in peak.items())]
    for name, value in (
        ("engine", f"{folder}, {_size(total)}"),
        ("base", f"{base_name(m)} ({m['base']['sha256']['all'][:12]}…)"),
        *([("plugged into", _plugged(m["plugged"]))] if "plugged" in m else []),
        ("guide", f"{guide['name']} ({guide['sha256'][:12]}…)" if guide else "none: the plain teacher"),
        ("backend", m["backend"] + "".join(f", {k} {v}" for k, v in m["compiler"].items())),
        ("target", m["target"]),
        ("precision", m["precision"] + "".join(f"; {k}: {_int8(n['int8'])}" for k, n in int8.items())),
        ("profiles", ", ".join(p["name"] for p in m["profiles"]) or f"any batch up to {m['sample']['max_batch']}"),
        ("pictures", _pictures(m)),
        ("parity", f"limit {m['parity']['limit']:.0e} against {m['parity']['against']}"),
        ("of engines", engine if isinstance(engine, str) else ", ".join(f"{k} {v:.1e}" for k, v in engine.items())),
        ("built", ", ".join(built)),
        ("rebuild", m["rebuild"]),
    ):
        facts.add_row(Text(name, style="bold"), Text(str(value)))
    networks = Table(box=None, pad_edge=False)
    for title in ("network", "file", "size", "precision", "parity", "compiled in", "inputs"):
        networks.add_column(title)
    for name, n in m["networks"].items():
        inputs = ", ".join(f"{k} {'×'.join(map(str, shape))}" for k, (_, shape) in n["inputs"].items())
        files = [f for f in m["files"] if f == n["file"] or f.startswith(n["file"] + ".")]
        networks.add_row(
            name, n["file"], _size(sum(m["files"][f]["bytes"] for f in files)), n["precision"],
            f"{n['parity']['graph']:.1e}", f"{n['compiled']['seconds']:g} s", inputs,
        )  # fmt: skip
    parts: list[RenderableType] = [facts, Text(), networks]
    if problem:
        parts += [Text(), Text(f"cannot run here: {problem}", style="red")]
    return Group(*parts)


def _int8(said: dict[str, Any]) -> str:
    """What is quantised in a network."""
    if not said["activations"]:
        return f"the weights of {said['layers']} layers"
    kept = len(said["decision"]["float"])
    return f"{said['layers']} layers with {said['share_of_macs']:.1%} of the arithmetic, {kept} left in floating point"


def _pictures(m: dict[str, Any]) -> str:
    """The sizes that a bundle draws, the default first."""
    default = f"{m['image']['height']}x{m['image']['width']}"
    legal = legal_sizes([Profile.from_dict(p) for p in m["profiles"]])
    return f"{default} (height x width)" + (f"; legal: {legal}" if legal not in ("", default) else "")


def base_name(m: dict[str, Any]) -> str:
    """The base model's name, with the LoRAs that are merged into it: ``emoji + sepia:0.8``."""
    loras = [f"{a['name']}" + ("" if a["scale"] == 1 else f":{a['scale']:g}") for a in m["base"].get("loras", ())]
    return " + ".join([m["base"]["name"], *loras])


def _plugged(p: dict[str, Any]) -> str:
    return f"{p['from']['name']} ({'; '.join(f'{k}: {v}' for k, v in p['networks'].items())})"


def layer_table(layers: list[Layer]) -> RenderableType:
    """Tensors of a graph for a terminal, see ``export.layers``."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for title in ("node", "op", "tensor", "shape", "off by", "largest", "finite", "near"):
        out.add_column(title, justify="right" if title in ("node", "off by", "largest") else "left")
    for one in layers:
        finite = "yes" if one.finite else "NO" if one.finite_in_float32 else "NO, nor in float32"
        shape = "×".join(map(str, one.shape))
        numbers = ("" if v != v else f"{v:.1e}" for v in (one.error, one.largest))
        out.add_row(str(one.place), one.op, one.tensor, shape, *numbers, finite, one.near)
    return out


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number < 2**30 else f"{number / 2**30:.2f} GiB"

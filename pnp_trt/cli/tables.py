"""The tables that `pnp-trt inspect`, `pnp-trt list` and `pnp-trt verify --layers` print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import Manifest, PlugRecord, QuantisedRecord
from ..bundle.profiles import legal_sizes
from ..bundle.store import known_bundles, read_manifest
from ..errors import InputError
from ..io.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..build.layers import LayerParity


def rows(home: Path) -> list[dict[str, Any]]:
    """Return one entry per bundle: name, bytes, backend, precision, target, base, guide, built; or its ``problem``."""
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
                "bytes": sum(f.size for f in m.files.values()),
                "backend": m.backend,
                "precision": m.precision,
                "target": m.target,
                "base": base_name(m),
                "guide": None if m.guide is None else m.guide.name,
                "built": m.built,
            }
        )
    return out


def table(bundles: list[dict[str, Any]]) -> RenderableType:
    """Return the entries of ``rows`` as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, pad_edge=False)
    for title in ("engine", "size", "backend", "precision", "target", "base", "guide", "built"):
        out.add_column(title, justify="right" if title == "size" else "left")
    for row in bundles:
        if "problem" in row:
            cells = ["", "damaged: see pnp-trt inspect"]
        else:
            cells = [str(row[k] or "none") for k in ("backend", "precision", "target", "base", "guide", "built")]
            cells = [_size(row["bytes"]), *cells]
        out.add_row(*(Text(printable(cell)) for cell in (row["name"], *cells)))
    return out


def render(folder: Path, m: Manifest, problem: str | None) -> RenderableType:
    """Return a manifest as tables for a terminal.

    Args:
        problem: why the bundle cannot run on this machine, or None.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in _facts(folder, m):
        facts.add_row(Text(name, style="bold"), Text(printable(value)))
    networks = Table(box=None, pad_edge=False)
    for title in ("network", "file", "size", "precision", "parity", "compiled in", "inputs"):
        networks.add_column(title)
    for name, n in m.networks.items():
        inputs = ", ".join(f"{k} {'×'.join(map(str, shape))}" for k, (_, shape) in n.inputs.items())
        size = sum(f.size for file, f in m.files.items() if file == n.file or file.startswith(f"{n.file}."))
        cells = (
            name, n.file, _size(size), n.precision, f"{n.parity.graph:.1e}", f"{n.compiled.seconds:g} s", inputs,
        )  # fmt: skip
        networks.add_row(*(Text(printable(cell)) for cell in cells))
    parts: list[RenderableType] = [facts, Text(), networks]
    if problem:
        parts += [Text(), Text(printable(f"cannot run here: {problem}"), style="red")]
    return Group(*parts)


def _facts(folder: Path, m: Manifest) -> list[tuple[str, str]]:
    """Titles and texts of a bundle's properties; the texts come from the manifest and are untrusted."""
    guide, engine = m.guide, m.parity.engine
    peaks = {"export": m.peak_memory.export, "compile": m.peak_memory.compile}
    built = [f"{m.built} in {m.build_seconds:g} s", *(f"peak memory {_size(v)} ({k})" for k, v in peaks.items() if v)]
    quantised = "".join(f"; {k}: {_quantised(n.quantised)}" for k, n in m.networks.items() if n.quantised is not None)
    measured = engine if isinstance(engine, str) else ", ".join(f"{k} {v:.1e}" for k, v in engine.items())
    return [
        ("engine", f"{folder}, {_size(sum(f.size for f in m.files.values()))}"),
        ("base", f"{base_name(m)} ({m.base.sha256['all'][:12]}…)"),
        *([("plugged into", _plugged(m.plugged))] if m.plugged is not None else []),
        ("guide", f"{guide.name} ({guide.sha256[:12]}…){_gain(m)}" if guide else "none: the plain teacher"),
        ("backend", m.backend + "".join(f", {k} {v}" for k, v in m.compiler.items())),
        ("target", m.target),
        ("precision", m.precision + quantised),
        ("profiles", ", ".join(p.name for p in m.profiles) or f"any batch up to {m.sample.max_batch}"),
        ("images", _images(m)),
        ("prompts", _prompts(m)),
        ("parity", f"limit {m.parity.limit:.0e} against {m.parity.against}"),
        ("engine parity", measured),
        *_kernels(m),
        ("built", ", ".join(built)),
        ("claimed rebuild command", m.rebuild),
    ]


def _gain(m: Manifest) -> str:
    """The factors of the guide's residuals over the timesteps, or an empty string if there are none."""
    gain = ((m.configs or {}).get("guide") or {}).get("gain")
    if not isinstance(gain, list):
        return ""
    return f"; gain from t = 0 to 999: {', '.join(f'{g:.3g}' if isinstance(g, int | float) else '?' for g in gain)}"


def _kernels(m: Manifest) -> list[tuple[str, str]]:
    """The compiler's report on each network's kernels, one row per profile."""
    from ..backends.tensorrt.layer_report import sentence

    rows = []
    for name, network in m.networks.items():
        reports = network.compiled.notes.get("reports")
        lines = [line for row in reports if (line := sentence(row))] if isinstance(reports, list) else []
        rows += [(f"{name} kernels", line) for line in lines]
    return rows


def _quantised(record: QuantisedRecord) -> str:
    """One phrase on what is quantised in a network."""
    if not record.activations:
        return f"the weights of {record.layers} layers"
    return (
        f"{record.layers} layers with {record.share_of_macs:.1%} of the arithmetic, "
        f"{len(record.floating_point)} left in floating point"
    )


def _images(m: Manifest) -> str:
    """The image sizes of a bundle, with the default first."""
    default = f"{m.image.height}x{m.image.width}"
    legal = legal_sizes(m.profiles)
    return f"{default} (height x width)" + (f"; legal: {legal}" if legal not in ("", default) else "")


def _prompts(m: Manifest) -> str:
    """The maximum number of tokens of a prompt."""
    length, chunks = m.tokens.length, m.text.chunks
    return f"{length} tokens" if chunks == 1 else f"up to {chunks * length} tokens in chunks of {length}"


def base_name(m: Manifest) -> str:
    """Return the base model's name with the LoRAs merged into it, such as ``emoji + sepia:0.8``."""
    loras = [lora.name + ("" if lora.scale == 1 else f":{lora.scale:g}") for lora in m.base.loras]
    return " + ".join([m.base.name, *loras])


def _plugged(p: PlugRecord) -> str:
    return f"{p.source['name']} ({'; '.join(f'{k}: {v}' for k, v in p.networks.items())})"


def layer_table(layers: list[LayerParity]) -> RenderableType:
    """Return the tensors of a graph, from ``build.layers``, as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, pad_edge=False)
    for title in ("node", "op", "tensor", "shape", "off by", "largest", "finite", "near"):
        out.add_column(title, justify="right" if title in ("node", "off by", "largest") else "left")
    for one in layers:
        finite = "yes" if one.finite else "NO" if one.finite_in_float32 else "NO, not in float32 either"
        shape = "×".join(map(str, one.shape))
        numbers = ("" if v != v else f"{v:.1e}" for v in (one.error, one.largest))
        cells = (str(one.place), one.op, one.tensor, shape, *numbers, finite, one.near)
        out.add_row(*(Text(printable(cell)) for cell in cells))
    return out


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number < 2**30 else f"{number / 2**30:.2f} GiB"

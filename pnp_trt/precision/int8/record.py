"""Calibration records: observations, results of the sweep, and the decision, as readable JSON.

A record belongs to one base and one guide.  ``pnp-trt calibrate`` writes it.  ``pnp-trt build --precision int8`` reads
its decision: the input range of every layer that uses INT8, and the layers that do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...bundle.store import digest, write_text
from ...errors import InputError
from ...graph.weights import LEVELS
from ...io.inputs import read_json
from ...io.json_schema import problem

SCHEMA = "pnp-trt/calibration/2"
#: former schema, in which the settings have the number of images as ``pictures``
_FORMER = "pnp-trt/calibration/1"
#: folders of records: the user's first, then the one in a checkout
HOMES = (Path("calibration"), Path(__file__).resolve().parents[3] / "calibration")
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_LAYER = {
    "type": "object",
    "required": ["kind", "macs", "amax", "by_timestep", "channels"],
    "properties": {
        "kind": {"enum": ["conv", "linear"]},
        "macs": {"type": "integer", "minimum": 0},
        "amax": {"type": "object", "additionalProperties": {"type": "number"}},
        "by_timestep": _NUMBERS,
        "channels": {"type": "array", "items": {"type": "number", "minimum": 0}},
    },
    "additionalProperties": {"enum": []},
}
#: JSON Schema of a record
_SHAPE: dict[str, Any] = {
    "type": "object",
    "required": ["base", "guide", "settings", "layers", "decision"],
    "properties": {
        "base": {"$ref": "#/$defs/weights"},
        "guide": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/weights"}]},
        "settings": {"type": "object"},
        "layers": {"type": "object", "additionalProperties": _LAYER},
        "sweep": {"type": "object"},
        "decision": {
            "type": "object",
            "required": ["float"],
            "properties": {
                "conv": {"type": "string"},
                "linear": {"type": "string"},
                "float": {"type": "array", "items": {"type": "string"}},
            },
        },
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "$defs": {
        "weights": {
            "type": "object",
            "required": ["name", "sha256"],
            "properties": {"name": {"type": "string"}, "sha256": {"type": "string"}},
        }
    },
}


@dataclass(frozen=True)
class ObservedLayer:
    """Observations of one convolution or linear layer.

    Attributes:
        kind: ``conv`` or ``linear``.
        macs: multiply-accumulates of one evaluation for one image.
        amax: largest magnitude of its input by method: ``max``, ``percentile-99.99`` …
        by_timestep: largest magnitude in each tenth of the timesteps, noisiest last.
        channels: largest magnitude of each input channel, ``[in]``, for SmoothQuant; linear layers only.
    """

    kind: str
    macs: int
    amax: dict[str, float]
    by_timestep: list[float]
    channels: list[float]


@dataclass(frozen=True)
class LayerRange:
    """How one layer is quantised.

    Attributes:
        amax: the magnitude that is mapped to 127.
        exponents: SmoothQuant's factors of the input channels as powers of two, ``[in]``: the input is multiplied by
            2^−e and the weight by 2^e, both without rounding errors; None without SmoothQuant.
    """

    amax: float
    exponents: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        """The input's scale in INT8."""
        return self.step(LEVELS)

    def step(self, largest: float) -> float:
        """Return the input's scale in a type whose largest magnitude is ``largest``."""
        return max(self.amax, 1e-6) / largest


@dataclass
class Record:
    """A calibration record.

    Attributes:
        base, guide: the observed base and guide, as in the build's identity: ``{"name", "sha256"}``; guide may be None.
        settings: settings of the run: prompts, images, steps, guidance scales, seed.
        layers: observations by name, ``unet.…`` or ``guide.…`` as in the student.
        sweep: ``methods``, ``layers`` and ``kept``: errors of the prediction; see ``sweep.py``.
        decision: ``{"conv": method, "linear": method, "float": [layers]}``.
        versions: versions of the packages used.
    """

    base: dict[str, Any]
    guide: dict[str, Any] | None
    settings: dict[str, Any]
    layers: dict[str, ObservedLayer]
    sweep: dict[str, Any] = field(default_factory=dict)
    decision: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def choices(self) -> dict[str, LayerRange]:
        """Return how each layer that uses INT8 is quantised, according to the record's decision."""
        in_float = set(self.decision["float"])
        return {n: choose(layer, self.decision[layer.kind]) for n, layer in self.layers.items() if n not in in_float}

    def whole_ranges(self) -> dict[str, LayerRange]:
        """Return the same layers with their full range, for FP8, which resolves small values even in a wide range."""
        return {n: LayerRange(self.layers[n].amax["max"]) for n in self.choices()}

    def share(self, layers: Collection[str] | None = None) -> float:
        """Return the share of all observed multiply-accumulates in ``layers``; by default those that use INT8."""
        layers = self.choices().keys() if layers is None else layers
        whole = sum(layer.macs for layer in self.layers.values())
        return sum(layer.macs for n, layer in self.layers.items() if n in layers) / max(whole, 1)

    def identity(self) -> str:
        """Return a digest of everything in the record that a build depends on."""
        return digest({n: asdict(c) for n, c in self.choices().items()})

    def write(self, path: Path) -> None:
        """Write the record atomically, with a line for each layer."""
        head = {"schema": SCHEMA, **{k: v for k, v in asdict(self).items() if k != "layers"}}
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(asdict(layer))}" for n, layer in self.layers.items())
        write_text(f'{text},\n "layers": {{\n{rows}\n }}\n}}\n', path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record and check every number of its decision.

        Raises:
            InputError: if it is missing, truncated, of another schema, or has a range that is negative or not finite.
        """
        advice = "make it again with pnp-trt calibrate"
        document = read_json(path, "the calibration record", advice)
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema not in (SCHEMA, _FORMER):
            raise InputError(f"{path} has schema {schema}, not {SCHEMA}; {advice}")
        if wrong := problem(document, _SHAPE):
            raise InputError(f"in the calibration record {path} {wrong}; {advice}")
        values = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        if schema == _FORMER and "pictures" in values["settings"]:
            values["settings"] = {"images" if k == "pictures" else k: v for k, v in values["settings"].items()}
        values["layers"] = {n: ObservedLayer(**layer) for n, layer in document["layers"].items()}
        record = cls(**values)
        try:
            choices = record.choices()
        except (KeyError, ValueError, OverflowError) as e:
            raise InputError(
                f"the calibration record {path} lacks a method that its decision uses ({e}); {advice}"
            ) from None
        for name, choice in choices.items():
            if not (math.isfinite(choice.amax) and choice.amax >= 0):
                raise InputError(f"the calibration record {path} has the range {choice.amax} for {name}; {advice}")
        return record


def choose(layer: ObservedLayer, method: str) -> LayerRange:
    """Return a layer's range by one method; ``smoothquant-A`` first scales the channels of a linear layer.

    Raises:
        KeyError: if the record lacks the method.
    """
    if not method.startswith("smoothquant-") or not layer.channels:
        return LayerRange(layer.amax["max" if method.startswith("smoothquant-") else method])
    # Xiao et al. 2023, eq. 4 without the weights' term, which per-channel scales replace: s = max|X|^α over its mean,
    # rounded to a power of two, so that scaling adds no rounding error
    alpha = float(method.removeprefix("smoothquant-"))
    largest = max(layer.channels)
    floor = largest * 2.0**-8  # a nearly constant-zero channel must not use up the weight's range
    logs = [alpha * math.log2(max(c, floor) or 1.0) for c in layer.channels]
    middle = sum(logs) / len(logs)
    exponents = tuple(round(v - middle) for v in logs)
    amax = max(c * 2.0**-e for c, e in zip(layer.channels, exponents, strict=True))
    return LayerRange(amax, exponents if any(exponents) else None)


def default_path(base: str, guide: str) -> Path:
    """Return the default path of the record of a base and a guide."""
    return HOMES[0] / f"{_word(base)}-{_word(guide).removeprefix(f'{_word(base)}-')}.int8.json"


def find(base: str, guide: str) -> Path:
    """Find the record of a base and a guide in ``HOMES``.

    Raises:
        InputError: if there is none; the message has the command that makes it.
    """
    name = default_path(base, guide).name
    for home in HOMES:
        if (home / name).is_file():
            return home / name
    raise InputError(
        f"8-bit inputs need recorded ranges, but there is no {HOMES[0] / name}; make it with: "
        f"pnp-trt calibrate --base {base} --guide {guide}, or name one with --calibration"
    )


def _word(name: str) -> str:
    return (Path(name).stem if name.endswith(".safetensors") else Path(name).name).replace(":", "-")

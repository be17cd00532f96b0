"""Export one network of a bundle: run it for its reference, convert, export, perhaps quantise, and compare it."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import Backend
from ..bundle.golden_file import Golden, Outputs, as_tuple
from ..bundle.manifest import NetworkParity, NetworkRecord, QuantisedRecord
from ..errors import PnpError
from ..models.specs import NetworkSpec
from ..precision.int8.record import Record
from ..precision.recipes import BF16, FP32, Recipe
from .sizes import SizePlan, output_names

if TYPE_CHECKING:
    from ..graph.weights import WeightMap


@dataclass
class NetworkExport:
    """Settings for exporting the networks of one bundle.

    Attributes:
        record: calibration record for INT8; None if the recipe needs none.
        target: GPU to build for; None assumes a GPU that supports all of the backend's types.
    """

    backend: Backend
    recipe: Recipe
    plan: SizePlan
    record: Record | None = None
    target: str | None = None

    def write(
        self, name: str, spec: NetworkSpec, cases: dict[str, dict[str, Any]], work: Path
    ) -> tuple[NetworkRecord, Golden, dict[str, Any]]:
        """Write one network; return its record before compilation, its golden inputs and outputs, and its weight map.

        Args:
            cases: golden inputs by label (``512x768``), the default size first.
        """
        from ..graph.weights import check_complete
        from ..precision.recipes import as_arrays, reference
        from . import modules
        from .onnx_export import export
        from .parity import golden_rows, relative_error

        path = work / f"{name}.onnx"
        module = spec.module()
        rows = golden_rows(name, sum(p.numel() for p in module.parameters()), self.plan.default)
        default, inputs = next(iter(cases.items()))
        cases = cases if spec.sized else {default: inputs}
        compared = {label: {k: v[:rows] for k, v in case.items()} for label, case in cases.items()}
        recipes = self.recipes(name)
        half = spec.decodes and recipes[0].dtype != FP32.dtype
        compared, hard = self._with_images(module, compared, rows) if half else (compared, [])
        expected = {label: as_arrays(reference(module, case)) for label, case in compared.items()}
        traced = {k: self.plan.traced(name, v) for k, v in inputs.items()}
        tried: list[str] = []
        for recipe in recipes:
            module, quantised = spec.module() if module is None else module, None
            if self.backend.takes_modules:
                path = work / f"{name}.json"
                weights = modules.save(recipe.convert(module), path)
                measure = partial(modules.relative_error, module)
            else:
                axes, others = self.plan.axes(name), output_names(name)
                weights = export(recipe.convert(module), traced, spec.outputs, path, axes, others)
                module = None  # its weights are rounded in place, and it is large
                gc.collect()
                quantised = self._quantize(recipe, path, weights)
                weights = quantised or weights
                weights = weights.derive(self.backend.prepare(path), _initializers(path))
                check_complete(path, weights)
                measure = partial(relative_error, path)
            errors = {label: measure(compared[label], expected[label]) for label in cases}
            all_errors = [*errors.values(), *(measure(*case) for case in hard if recipe.dtype != FP32.dtype)]
            error = float(np.max(all_errors))  # NaN if any is
            module = None
            if error <= recipe.limit:  # also refuses NaN
                break
            tried.append(f"{error:.2e} in {recipe.name}, where {recipe.limit:.0e} is allowed")
        else:
            raise _too_far_off(name, tried, path, next(iter(compared.values())), recipe.limit)
        record = NetworkRecord(
            graph=path.name,
            precision=recipe.name,
            **self._tensors(name, inputs, dict(zip(spec.outputs, as_tuple(expected[default]), strict=True))),
            parity=NetworkParity(error, recipe.limit, rows, errors if len(errors) > 1 else {}),
            fallback=f"off by {tried[0]}" if tried else None,
            quantised=None if quantised is None else self._quantised_record(recipe, weights),
        )
        references = {
            name if label == default else f"{name}@{label}": ({k: v.numpy() for k, v in case.items()}, expected[label])
            for label, case in compared.items()
        }
        return record, references, weights.as_dict()

    def _with_images(
        self, decoder: Any, cases: dict[str, dict[str, Any]], rows: int
    ) -> tuple[dict[str, dict[str, Any]], list[tuple[dict[str, Any], Outputs]]]:
        """Add latents of images to a half-precision decoder's cases: as a further case, or within cases of one row."""
        from .parity import realistic_case, with_latents_of_images

        if rows == 1:  # the network is large: one run instead of two
            return {label: with_latents_of_images(decoder, case, self.plan.factor) for label, case in cases.items()}, []
        return cases, [realistic_case(decoder, next(iter(cases.values())), self.plan.factor)]

    def _tensors(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        """The record's ``inputs`` and ``outputs``: type and shape by name, with names for open axes."""
        return {
            "inputs": {
                n: (str(v.dtype).removeprefix("torch."), tuple(self.plan.named(name, v.shape)))
                for n, v in inputs.items()
            },
            "outputs": {n: ("float32", tuple(self.plan.named(name, v.shape, output=True))) for n, v in outputs.items()},
        }

    def recipes(self, name: str) -> list[Recipe]:
        """The recipe of a network, followed by the fallbacks to try when its error is too large."""
        first = self.recipe.of_network(name)
        if name not in first.fallback:
            return [first]
        # bfloat16 has the range of float32
        types = self.backend.elements if self.target is None else self.backend.elements_of(self.target)
        between = [BF16] if first.dtype == "float16" and BF16.elements <= types else []
        return [first, *between, FP32]

    def _quantize(self, recipe: Recipe, path: Path, weights: WeightMap) -> WeightMap | None:
        """Apply the recipe's quantisation pass; return the new weight map, or None if the recipe does not quantise."""
        derived = recipe.quantize(path, weights, self.record)
        return None if derived is None else weights.derive(derived, _initializers(path))

    def _quantised_record(self, recipe: Recipe, weights: WeightMap) -> QuantisedRecord:
        """The manifest's entry for a quantised network."""
        steps = [w["transform"][-1]["op"] for w in weights.weights.values() if w["transform"]]
        kind = "fp8" if "float8" in steps else "int8"
        layers = sum(step in ("quantize", "float8") for step in steps)
        if self.record is None:
            return QuantisedRecord(kind, layers, activations=False)
        sweep, chosen = self.record.sweep, recipe.choices(self.record)
        decision = self.record.decision
        if set(chosen) != set(self.record.choices()):  # fewer layers than decided, so the sweep's figures do not apply
            sweep, decision = {}, {"float": [n for n in self.record.layers if n not in chosen]}
        details = {
            "share_of_macs": round(self.record.share(chosen), 4), "decision": decision,
            "kept": sweep.get("kept"), "latent_error": sweep.get("latent_error"),
            "recorded_on": self.record.settings, "base_sha256": self.record.base["sha256"],
        }  # fmt: skip
        return QuantisedRecord(kind, layers, activations=True, details=details)


def _too_far_off(name: str, tried: list[str], path: Path, inputs: dict[str, Any], limit: float) -> PnpError:
    """The exception for a network whose error is too large in every recipe; ``path`` is the last graph tried."""
    return PnpError(
        f"the exported {name} differs from PyTorch by {', and '.join(tried)} (relative); "
        f"{_what_is_off(path, inputs, limit)}nothing was written; choose another --precision, or report it"
    )


def _what_is_off(path: Path, inputs: dict[str, Any], limit: float) -> str:
    """A clause naming the first bad tensor of a graph; empty if there is none or the graph cannot be examined."""
    from .layers import layerwise, verdict

    if path.suffix != ".onnx":
        return ""
    with suppress(PnpError):
        sentence, problem = verdict(layerwise(path, {k: v[:1].numpy() for k, v in inputs.items()}), limit)
        return f"{sentence}; " if problem else ""
    return ""


def _initializers(path: Path) -> list[str]:
    import onnx_ir as ir

    return list(ir.load(path).graph.initializers)

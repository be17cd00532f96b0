"""One network of a bundle: run for its reference, converted, exported, quantised by some recipes, compared."""

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
    """How the networks of one bundle are written.

    Attributes:
        record: what INT8 was calibrated to; None where the recipe needs none.
        target: GPU that it is for; None stands for one with all of the backend's types.
    """

    backend: Backend
    recipe: Recipe
    plan: SizePlan
    record: Record | None = None
    target: str | None = None

    def write(
        self, name: str, spec: NetworkSpec, cases: dict[str, dict[str, Any]], work: Path
    ) -> tuple[NetworkRecord, Golden, dict[str, Any]]:
        """One network written: its record, not compiled yet, its golden inputs and outputs, and its weights' map.

        Args:
            cases: golden inputs by what tells them apart (``512x768``), that of the default size first.
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
        wanted = {label: as_arrays(reference(module, case)) for label, case in compared.items()}
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
                module = None  # rounded in place, and large
                gc.collect()
                quantised = self._quantize(recipe, path, weights)
                weights = quantised or weights
                weights = weights.derive(self.backend.prepare(path), _initializers(path))
                check_complete(path, weights)
                measure = partial(relative_error, path)
            errors = {label: measure(compared[label], wanted[label]) for label in cases}
            found = [*errors.values(), *(measure(*case) for case in hard if recipe.dtype != FP32.dtype)]
            error = float(np.max(found))  # NaN if any is
            module = None
            if error <= recipe.limit:  # also refuses NaN
                break
            tried.append(f"{error:.2e} in {recipe.name}, where {recipe.limit:.0e} is allowed")
        else:
            raise _too_far_off(name, tried, path, next(iter(compared.values())), recipe.limit)
        record = NetworkRecord(
            graph=path.name,
            precision=recipe.name,
            **self._tensors(name, inputs, dict(zip(spec.outputs, as_tuple(wanted[default]), strict=True))),
            parity=NetworkParity(error, recipe.limit, rows, errors if len(errors) > 1 else {}),
            fallback=f"off by {tried[0]}" if tried else None,
            quantised=None if quantised is None else self._quantised_record(recipe, weights),
        )
        references = {
            name if label == default else f"{name}@{label}": ({k: v.numpy() for k, v in case.items()}, wanted[label])
            for label, case in compared.items()
        }
        return record, references, weights.as_dict()

    def _with_images(
        self, decoder: Any, cases: dict[str, dict[str, Any]], rows: int
    ) -> tuple[dict[str, dict[str, Any]], list[tuple[dict[str, Any], Outputs]]]:
        """Cases of a decoder in half precision and, beside them, latents of images; of one row the case has both."""
        from .parity import realistic_case, with_latents_of_images

        if rows == 1:  # large: one run instead of two
            return {label: with_latents_of_images(decoder, case, self.plan.factor) for label, case in cases.items()}, []
        return cases, [realistic_case(decoder, next(iter(cases.values())), self.plan.factor)]

    def _tensors(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        """The record's ``inputs`` and ``outputs``: type and shape by name, with the names of open axes."""
        return {
            "inputs": {
                n: (str(v.dtype).removeprefix("torch."), tuple(self.plan.named(name, v.shape)))
                for n, v in inputs.items()
            },
            "outputs": {n: ("float32", tuple(self.plan.named(name, v.shape, output=True))) for n, v in outputs.items()},
        }

    def recipes(self, name: str) -> list[Recipe]:
        """What a network is exported in, and what is tried when that is too far off."""
        first = self.recipe.of_network(name)
        if name not in first.fallback:
            return [first]
        # bfloat16 has the range of float32
        types = self.backend.elements if self.target is None else self.backend.elements_of(self.target)
        between = [BF16] if first.dtype == "float16" and BF16.elements <= types else []
        return [first, *between, FP32]

    def _quantize(self, recipe: Recipe, path: Path, weights: WeightMap) -> WeightMap | None:
        """Apply the recipe's graph pass; the new map, or None where the recipe has none."""
        derived = recipe.quantize(path, weights, self.record)
        return None if derived is None else weights.derive(derived, _initializers(path))

    def _quantised_record(self, recipe: Recipe, weights: WeightMap) -> QuantisedRecord:
        """What the manifest records of a quantised network."""
        steps = [w["transform"][-1]["op"] for w in weights.weights.values() if w["transform"]]
        kind = "fp8" if "float8" in steps else "int8"
        layers = sum(step in ("quantize", "float8") for step in steps)
        if self.record is None:
            return QuantisedRecord(kind, layers, activations=False)
        sweep, chosen = self.record.sweep, recipe.choices(self.record)
        decision = self.record.decision
        if set(chosen) != set(
            self.record.choices()
        ):  # fewer layers than the decision: the sweep's figures are not theirs
            sweep, decision = {}, {"float": [n for n in self.record.layers if n not in chosen]}
        details = {
            "share_of_macs": round(self.record.share(chosen), 4), "decision": decision,
            "kept": sweep.get("kept"), "latent_error": sweep.get("latent_error"),
            "recorded_on": self.record.settings, "base_sha256": self.record.base["sha256"],
        }  # fmt: skip
        return QuantisedRecord(kind, layers, activations=True, details=details)


def _too_far_off(name: str, tried: list[str], path: Path, inputs: dict[str, Any], limit: float) -> PnpError:
    """The error of a network that no recipe computes well enough; ``path`` is its last graph."""
    return PnpError(
        f"the exported {name} differs from PyTorch by {', and '.join(tried)} (relative); "
        f"{_what_is_off(path, inputs, limit)}nothing was written; choose another --precision, or report it"
    )


def _what_is_off(path: Path, inputs: dict[str, Any], limit: float) -> str:
    """A clause that names the first bad tensor of a graph; empty where none is found, or it cannot be looked at."""
    from .layers import layerwise, verdict

    if path.suffix != ".onnx":
        return ""
    with suppress(PnpError):
        said, problem = verdict(layerwise(path, {k: v[:1].numpy() for k, v in inputs.items()}), limit)
        return f"{said}; " if problem else ""
    return ""


def _initializers(path: Path) -> list[str]:
    import onnx_ir as ir

    return list(ir.load(path).graph.initializers)

"""Sweep to select the layers for INT8: the error of each layer, the best method, and how many layers stay in float.

The error is ‖ε̂ − ε‖ / ‖ε‖ of the network's prediction on states of the sampler that are not used for calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .observe import METHODS, Loop
from .record import LayerRange, ObservedLayer, choose
from .simulate import quantised

SMOOTH = ("smoothquant-0.5", "smoothquant-0.8")
#: shares of the layers that stay in float, most sensitive first
FLOAT_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)


@dataclass
class Probes:
    """States of the sampler, and the float32 predictions for them.

    Attributes:
        states: ``(x, t, rows, w)``, each of one step of a batch.
        predictions: the float32 prediction for each state.
    """

    states: list[tuple[Tensor, int, Tensor, Tensor]]
    predictions: list[Tensor]

    @classmethod
    @torch.no_grad()
    def collect(cls, loop: Loop, seed: int, images: int, most: int) -> Probes:
        """Collect evenly spaced states of one run, at most ``most``."""
        states: list[tuple[Tensor, int, Tensor, Tensor]] = []
        loop.run(seed, images, lambda *state: states.append(state))
        count = min(most, len(states))
        # the middle of each of ``count`` equal parts of the run
        states = [states[(2 * i + 1) * len(states) // (2 * count)] for i in range(count)]
        return cls(states, [loop.predict(*s) for s in states])

    @torch.no_grad()
    def error(self, loop: Loop) -> float:
        """Return the relative error of the network in its current form."""
        off = whole = 0.0
        for state, exact in zip(self.states, self.predictions, strict=True):
            off += float((loop.predict(*state) - exact).double().square().sum())
            whole += float(exact.double().square().sum())
        return (off / whole) ** 0.5


class Sweep:
    """The sweep; every figure is saved as soon as it is measured, so that an interrupted sweep can resume.

    Args:
        modules: the candidate layers.
        layers: their observations.
        figures: figures of an earlier run, which are updated.
        save: called after each figure.
    """

    def __init__(
        self, loop: Loop, probes: Probes, modules: dict[str, nn.Module], layers: dict[str, ObservedLayer],
        figures: dict[str, Any], save: Callable[[], None], progress: Callable[[str, int, int, str], None],
    ) -> None:  # fmt: skip
        self.loop, self.probes, self.modules, self.layers = loop, probes, modules, layers
        self.figures, self._save, self._progress = figures, save, progress

    def methods(self) -> dict[str, str]:
        """Return the best method for each kind of layer, measured with all layers of the kind in INT8."""
        table = self.figures.setdefault("methods", {})
        kinds = sorted({layer.kind for layer in self.layers.values()})
        jobs = [(k, m) for k in kinds for m in (*METHODS, *(SMOOTH if k == "linear" else ()))]
        for i, (kind, method) in enumerate(jobs):
            self._progress("methods", i, len(jobs), f"{kind} {method}")
            row = table.setdefault(kind, {})
            if method not in row:
                names = [n for n, layer in self.layers.items() if layer.kind == kind]
                row[method] = self._error({n: choose(self.layers[n], method) for n in names})
                self._save()
        return {kind: min(table[kind], key=lambda m, k=kind: table[k][m]) for kind in kinds}  # type: ignore[misc]

    def each(self, best: dict[str, str]) -> list[str]:
        """Return the layers in descending order of error relative to their arithmetic."""
        table = self.figures.setdefault("layers", {})
        for i, (name, layer) in enumerate(self.layers.items()):
            self._progress("layers", i, len(self.layers), name)
            if name not in table:
                table[name] = self._error({name: choose(layer, best[layer.kind])})
                self._save()
        return sorted(self.layers, key=lambda n: table[n] ** 2 / max(self.layers[n].macs, 1), reverse=True)

    def float_layers(self, best: dict[str, str], order: list[str], limit: float) -> list[str]:
        """Return the fewest layers to leave in float for an error within ``limit``, else for the smallest error."""
        table = self.figures.setdefault("kept", [])
        whole = sum(layer.macs for layer in self.layers.values())
        for i, share in enumerate(FLOAT_SHARES):
            self._progress("kept", i, len(FLOAT_SHARES), f"{share:.0%} of the layers")
            count = round(share * len(order))
            if all(row["kept"] != count for row in table):
                used = order[count:]
                error = self._error({n: choose(self.layers[n], best[self.layers[n].kind]) for n in used})
                macs = sum(self.layers[n].macs for n in used) / whole
                table.append({"kept": count, "error": error, "int8_macs": round(macs, 4)})
                self._save()
        enough = [row for row in table if row["error"] <= limit]
        row = min(enough, key=lambda r: r["kept"]) if enough else min(table, key=lambda r: r["error"])
        return order[: row["kept"]]

    def _error(self, choices: dict[str, LayerRange]) -> float:
        with quantised(self.modules, choices):
            return float(f"{self.probes.error(self.loop):.4g}")


def latent_error(
    loop: Loop, modules: dict[str, nn.Module], choices: dict[str, LayerRange], seeds: Iterable[int]
) -> float:
    """Return ‖x̂₀ − x₀‖ / ‖x₀‖ of the final latents after the whole loop, from the same noise."""
    off = whole = 0.0
    for seed in seeds:
        exact = loop.run(seed, 4)
        with quantised(modules, choices):
            approximate = loop.run(seed, 4)
        off += float((approximate - exact).double().square().sum())
        whole += float(exact.double().square().sum())
    return (off / whole) ** 0.5

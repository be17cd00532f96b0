"""Samples and measures every rival, on its base and, without further training, in both fine-tunes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnp_trt.bench.measure import cost
from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.bundle.store import digest, sha256, write_json
from pnp_trt.errors import InputError

from .. import compare
from ..cells import TEACHER
from ..compare import Ranked
from ..gpu_train import prediction_error
from ..measures import Shots, chroma, real_images, recalls
from ..provenance import machine
from ..runner import captions
from ..sampler import Ask, Guidance, Predict, Sampler
from ..tables import spread
from . import RIVALS
from .base import Rival
from .train import load, read_record
from .world import BASES, World, beside_of, unet_file

SCHEMA = "pnp-trt/emoji-rivals/2"
SCALES = (3.0, 5.0)
#: steps on the base, and in the fine-tunes
STEPS, TUNED_STEPS = (50, 16, 8), (16,)
NONE, CFG = "none", "cfg"
#: the rival that the others are compared with
OURS = "tiny"
#: batch size and number of batches of the held-out error
ERROR_BATCH, ERROR_ROUNDS = 256, 12


@dataclass(frozen=True)
class Cell:
    """One set of images: a rival, ``none`` or ``cfg``, on a base.  Without guidance w is 1."""

    method: str
    base: str
    steps: int
    w: float

    def against(self, method: str) -> Cell:
        """The cell of another method with the same base, steps and w; ``none`` has no w."""
        return Cell(method, self.base, self.steps, 1.0 if method == NONE else self.w)


def all_cells(rivals: Sequence[str], steps: Sequence[int] = STEPS, tuned: Sequence[int] = TUNED_STEPS) -> list[Cell]:
    """Cells to measure, starting with those that others are compared with."""
    cells = []
    for base in BASES:
        for count in steps if base == TEACHER else tuned:
            cells.append(Cell(NONE, base, count, 1.0))
            cells += [Cell(method, base, count, w) for method in (CFG, *rivals) for w in SCALES]
    return cells


class _Whole(nn.Module):
    """A U-Net with a rival as one module, for counting MACs."""

    def __init__(self, unet: Any, rival: Rival) -> None:
        super().__init__()
        self.unet, self.rival = unet, rival

    def forward(self, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor) -> Tensor:
        return self.rival(self.unet, x, t, text, empty, w)


def costs(rival: Rival, unet: Any, empty: Tensor) -> dict[str, Any]:
    """Parameters, and MACs with attention products at batch 1: added per evaluation, and once per image.

    The MACs of the U-Net itself are included.
    """
    size = unet.config.sample_size
    x = torch.empty(1, unet.config.in_channels, size, size)
    inputs = {"x": x, "t": torch.zeros(1, dtype=torch.long), "text": empty.cpu(), "empty": empty.cpu()}
    alone = cost.count(unet, (inputs["x"], inputs["t"], inputs["text"])).macs
    whole = cost.count(_Whole(unet, rival), {**inputs, "w": torch.ones(1)}).macs
    once = 0
    if rival.once is not None:
        once = cost.count(rival.get_submodule(rival.once), (inputs["text"], inputs["empty"])).macs
    return {
        "parameters": sum(p.numel() for p in rival.parameters()), "macs_per_evaluation": whole - alone - once,
        "macs_per_image": once, "macs_of_unet": alone,
    }  # fmt: skip


class Measurer:
    """Samples each cell once, caches it, and measures it.

    Args:
        out: folder of the trained rivals.
        cache: rendered images of the artists; samples are cached in ``cache/rivals/``.
        device: ``cpu`` or ``cuda``, float32 on both.
        batch: images per batch.
    """

    def __init__(
        self, world: World, out: Path, judge: Path, cache: Path, images: int, device: str, batch: int
    ) -> None:  # fmt: skip
        self.world, self.out, self.cache, self.images, self.batch = world, out, cache, images, batch
        self.head, self.extract = AlignmentHead.load(judge), FeatureExtractor(device)
        self.sampler = Sampler(world.assets / "emoji", device=device)
        self.folder = cache / "rivals"
        self.hashes = {base: sha256(unet_file(world.assets, base)) for base in BASES}
        self._weights: dict[str, str] = {}
        self._rivals: dict[str, Rival] = {}
        self._real: dict[str, Shots] = {}

    def rival(self, name: str) -> Rival:
        if name not in self._rivals:
            self._rivals[name] = load(name, self.world.unet(TEACHER), self.out)
        return self._rivals[name]

    def has(self, name: str) -> bool:
        """Whether the rival is trained."""
        return (self.out / f"{name}.safetensors").is_file()

    def rows(self, base: str) -> list[Ask]:
        """Trained captions: the base's, or those of the fine-tune's style."""
        return captions("train" if base == TEACHER else base, self.images)

    def predict(self, cell: Cell) -> Predict:
        unet = self.world.unet(cell.base)
        if cell.method not in (NONE, CFG):
            rival = self.rival(cell.method)
            rival.check(unet)
            return beside_of(rival, unet, self.world.empty)
        return lambda x, t, text, _: unet(x, t, text, return_dict=False)[0]

    def shots(self, cell: Cell) -> Shots:
        """The cell's images and features, sampled unless they are cached."""
        kind = {NONE: "none", CFG: "cfg"}.get(cell.method, "guided")
        if kind == "guided" and cell.method not in self._weights:
            self._weights[cell.method] = sha256(self.out / f"{cell.method}.safetensors")
        weights = [self.hashes[cell.base], self._weights.get(cell.method)]
        key = digest([asdict(cell), weights, self.images, self.sampler.device, self.batch])

        def make() -> Any:
            return self.sampler.draw(
                self.rows(cell.base), self.predict(cell), Guidance(kind, cell.w), self.sampler.schedule(cell.steps),
                self.batch,
            )  # fmt: skip

        return Shots.cached(self.folder / f"{cell.method}-{cell.base}-{cell.steps}-{key[:12]}.npz", make, self.extract)

    def sample(self, cell: Cell) -> None:
        """Put the cell into the cache."""
        self.shots(cell)

    def real(self, base: str) -> Shots:
        """The artists' images of the captions."""
        if base not in self._real:
            key = digest([base, self.images, [asdict(a) for a in self.rows(base)]])[:12]
            self._real[base] = Shots.cached(
                self.folder / f"real-{base}-{key}.npz", lambda: real_images(self.rows(base), self.cache), self.extract
            )
        return self._real[base]

    def at(self, cell: Cell) -> Ranked:
        return Ranked.of(self.shots(cell), [a.concept for a in self.rows(cell.base)], self.head)

    def ceiling(self, base: str) -> dict[str, Any]:
        """Scores of the artists' own images."""
        real = self.real(base)
        ranks = self.head.ranks(real.features, [a.concept for a in self.rows(base)])
        return {**recalls(ranks), "chroma": chroma(real.pixels)}

    def about(self, cell: Cell) -> dict[str, Any]:
        """Measures of one cell, paired with CFG and with no guidance at the same steps, captions and noise."""
        mine, real = self.at(cell), self.real(cell.base)
        how = Guidance("cfg" if cell.method == CFG else "none", cell.w)
        evaluations = how.evaluations(self.sampler.schedule(cell.steps))
        row = {**asdict(cell), "evaluations": evaluations, **compare.quality(real, [mine])}
        row["chroma"] = chroma(mine.shots.pixels)
        if cell.method not in (NONE, CFG):
            teacher = [self.at(cell.against(CFG))]
            row["distance_to_cfg"] = compare.distance([mine], teacher)
            row["gain_over_cfg"] = compare.gain(real, teacher, [mine])
            if cell.method != OURS and self.has(OURS):
                ours = [self.at(cell.against(OURS))]
                row["gain_over_ours"] = {
                    **compare.gain(real, ours, [mine]), **compare.nearer([mine], ours, teacher),
                }  # fmt: skip
        if cell.method != NONE:
            row["gain_over_none"] = compare.gain(real, [self.at(cell.against(NONE))], [mine])
        return row

    def error(self, name: str, base: str, rounds: int, seed: int) -> dict[str, Any]:
        """Held-out error by time, on the same states for all rivals: noised images and CFG's trajectories."""
        # before the seed, because loading a rival uses random numbers
        unet, predict = self.world.unet(base), beside_of(self.rival(name), self.world.unet(base), self.world.empty)
        torch.manual_seed(seed)
        states = self.world.states(base, ERROR_BATCH, own=0.0)
        return prediction_error(unet, predict, states, self.world.empty, rounds)


def measure(
    assets: Path, data: Path, out: Path, judge: Path, cache: Path, results: Path, *, images: int = 512,
    device: str = "cpu", batch: int = 64, processes: int = 1, rounds: int = ERROR_ROUNDS, command: str = "",
    steps: Sequence[int] = STEPS, tuned: Sequence[int] = TUNED_STEPS,
) -> dict[str, Any]:  # fmt: skip
    """Measure every rival in ``out``; write the record to ``results`` and return it.

    Args:
        assets, data: see :class:`~.world.World`.
        judge: the frozen alignment head.
        images: images per cell.
        processes: number of processes that measure, and on a CPU also sample.
        rounds: batches of the held-out error; 0 leaves it out.
        steps, tuned: numbers of steps on the base and in the fine-tunes.

    Raises:
        InputError: if no rival is trained, for rivals trained with negative prompts, or for fewer than 4 images.
    """
    if images < 4:
        raise InputError(f"images must be at least 4, got {images}")
    trained = read_record(out)["rivals"]
    if any(entry.get("negative") for entry in trained.values()):
        raise InputError(
            f"the rivals in {out} are trained with negative prompts; measure them with: "
            "python -m benchmarks.emoji.negative --rivals"
        )
    names = [n for n in RIVALS.names() if n in trained]
    if not names:
        raise InputError(f"no rival is trained in {out}; run: python -m benchmarks.emoji.rivals train")
    facts = machine(command)  # first, so that missing requirements fail at once and not after minutes
    begun = time.monotonic()
    measurer = Measurer(World(assets, data, torch.device(device)), out, judge, cache, images, device, batch)
    unet = measurer.world.unet(TEACHER)
    cells = all_cells(names, steps, tuned)
    for base in BASES:
        measurer.real(base)
    # a GPU cannot be used in forked processes
    samplers = processes if device == "cpu" else 1
    if processes > 1:
        torch.set_num_threads(1)  # of each process
    spread(measurer.sample, cells, samplers, "sampling")
    pairs = [(name, base) for name in names for base in BASES] if rounds else []
    errors = spread(lambda pair: measurer.error(*pair, rounds, seed=7), pairs, samplers, "errors on fresh states")
    rivals = {
        name: {
            "title": RIVALS[name].title, "source": RIVALS[name].source, **trained[name],
            **costs(measurer.rival(name), unet, measurer.world.empty),
            "error": {base: error for (of, base), error in zip(pairs, errors, strict=True) if of == name},
        }
        for name in names
    }  # fmt: skip
    ceilings = {base: measurer.ceiling(base) for base in BASES}
    document = {
        "schema": SCHEMA,
        "provenance": {**facts, "bases_sha256": measurer.hashes, "judge_sha256": measurer.head.sha256},
        "settings": {
            "images": images, "device": device, "batch": batch, "sampler": "DDIM, eta 0", "scales": list(SCALES),
            "error_batch": ERROR_BATCH, "error_rounds": rounds,
            "training": {k: v for k, v in read_record(out).items() if k not in ("schema", "rivals")},
        },
        "real": ceilings,
        "rivals": rivals,
        "cells": spread(measurer.about, cells, processes, "measuring"),
    }  # fmt: skip
    document["settings"]["seconds"] = round(time.monotonic() - begun, 1)
    write_json(results, document)
    return document

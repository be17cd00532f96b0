"""Samples each set of images of the tables once, and caches it so that a killed run continues."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import FeatureExtractor
from pnp_trt.bundle.store import digest, sha256, write_json
from pnp_trt.errors import InputError
from pnp_trt.models.catalog import guide_folder
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.networks import quiet_libraries
from pnp_trt.models.student import Student
from pnp_trt.models.teacher import BaseModel
from pnp_trt.processor import multiplies

from .cells import BEST, FINE_TUNES, INTERVALS, STAGE2_STEPS, SWEEP, SWEEP_IMAGES, TEACHER, Cell
from .data import BASE_STYLES, STYLES, split
from .measures import Shots, real_images
from .network import Network, settle
from .sampler import BATCH, SCALES, Ask, Guidance, Sampler, asks

GUIDES = ("tiny", *(f"tiny-{s}" for s in STAGE2_STEPS), "full")
#: distance between the seeds of two noise sets, larger than any set
SEED_STRIDE = 100_000
#: steps of the trial that chooses a network's precision, unless its guide was trained for fewer
TRIAL_STEPS = 20


def find_guides(folder: Path | None) -> tuple[dict[str, Path], dict[str, str]]:
    """``({name: folder}, {name: why it is missing})``; without a folder, the guides shipped with the package.

    Raises:
        InputError: if ``folder`` is given but is not a folder.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"--guides {folder} is not a folder; give a folder that contains {', '.join(GUIDES)}, or some of them"
        )
    folders, missing = {}, {}
    for name in GUIDES:
        try:
            path = guide_folder(f"emoji-{name}") if folder is None else folder / name
        except InputError:
            missing[name] = f"there is no bundled guide {name!r}"
            continue
        if (path / "config.json").is_file():
            folders[name] = path
        else:
            missing[name] = f"the guides' folder holds no {name!r}"
    return folders, missing


def captions(name: str, images: int) -> list[Ask]:
    """Captions and seeds of a captions set, first noise set: ``images`` trained captions, or all held-out ones."""
    parts = split()
    if name in FINE_TUNES:
        return asks(parts["train"], [STYLES[name.removeprefix("emoji-")]], images)
    if name in ("train", SWEEP):
        return asks(parts["train"], BASE_STYLES, min(SWEEP_IMAGES, images) if name == SWEEP else images)
    return asks(parts[name], BASE_STYLES, min(len(BASE_STYLES) * len(parts[name]), images))


class Runner:
    """Samples each set of images of the cells once, and caches it.

    Args:
        bases: U-Nets by name; text encoder, decoder and schedule are those of ``emoji``.
        guides: guides' folders by name.
        compiled: whether networks may be compiled.
        device: ``cpu`` or ``cuda``; on the latter, networks are float32 and eager.
    """

    def __init__(
        self, bases: dict[str, BaseModel], guides: dict[str, Path], extract: FeatureExtractor, cache: Path,
        images: int, batch: int = BATCH, compiled: bool = True, device: str = "cpu",
    ) -> None:  # fmt: skip
        quiet_libraries()
        self.bases, self.images, self.batch = bases, images, batch
        self.device, self.compiled = device, compiled and device == "cpu"
        self.cache, self.folder, self.extract = cache, cache / "tables", extract
        self.sampler = Sampler(bases[TEACHER].folder, device=device)
        self.guides = {name: load_guide(str(path)).to(device) for name, path in guides.items()}
        for guide in self.guides.values():
            Student(self.sampler.unet, guide)  # rejects a guide of a different shape before hours of work
        self.guide_hashes = {
            name: {p.name: sha256(p) for p in (path / "config.json", *sorted(path.glob("*.safetensors")))}
            for name, path in guides.items()
        }
        self.best: dict[tuple[int, float], str] = {}
        self._network: tuple[str, Network] | None = None
        self._real: dict[str, Shots] = {}

    # ------------------------------------------------------------------------------------------- cells

    def rows(self, cell: Cell) -> list[Ask]:
        return [replace(a, seed=a.seed + SEED_STRIDE * cell.seed) for a in captions(cell.captions, self.images)]

    def guidance(self, cell: Cell) -> Guidance:
        return cell.guidance(self.best.get((cell.steps, cell.w)))

    def guidance_open(self, cell: Cell) -> bool:
        """Whether the sweep has yet to determine the cell's interval."""
        return cell.interval == BEST and (cell.steps, cell.w) not in self.best

    def evaluations(self, cell: Cell) -> int:
        """U-Net evaluations per image; before the sweep, those of the longest interval."""
        schedule = self.sampler.schedule(cell.steps)
        if self.guidance_open(cell):
            return max(cell.guidance(name).evaluations(schedule) for name in INTERVALS)
        return self.guidance(cell).evaluations(schedule)

    def _weights(self, cell: Cell) -> list[Any]:
        return [self.bases[cell.base].fingerprint(), self.guide_hashes[cell.guide] if cell.guide else None]

    def key(self, cell: Cell) -> str:
        """Name of the cell's images, which is the same in all tables for the same weights and settings."""
        how = self.guidance(cell)
        rows = [astuple(a) for a in self.rows(cell)]
        settings = [
            self.sampler.schedule_config,
            cell.steps,
            how.settings(),
            self.batch,
            multiplies("bfloat16"),
            self.compiled,
            *([] if self.device == "cpu" else [self.device]),
        ]
        return digest([self._weights(cell), settings, torch.__version__, rows])[:16]

    # --------------------------------------------------------------------------------------------------- networks

    def network(self, cell: Cell) -> Network:
        """The cell's U-Net and guide, compiled; only the last network is kept, to save memory."""
        name = cell.network
        if self._network is not None and self._network[0] == name:
            return self._network[1]
        self._network = None
        # drop the previous network's compiled code; dynamo stops compiling a class after eight instances
        torch._dynamo.reset()
        gc.collect()
        unet = self.bases[cell.base].unet().to(self.device)
        guide = self.guides[cell.guide] if cell.guide else None
        record = self.record(cell)
        if record is not None:
            network = Network(unet, guide, record["precision"], record["compiled"], self.batch)
        else:
            how = Guidance("guided" if guide else "cfg", max(SCALES))
            steps = cell.steps if cell.method == "tiny-stage2" else TRIAL_STEPS
            trial = captions(cell.captions, self.images)[:8]
            schedule = self.sampler.schedule(steps)
            network, record = settle(
                unet, guide, lambda p: self.sampler.draw(trial, p, how, schedule), self.batch, self.compiled
            )
            record |= {"trial": {"images": len(trial), "w": how.w, "steps": steps}}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._record_file(cell), record)
        self._network = (name, network)
        return network

    def _record_file(self, cell: Cell) -> Path:
        what = [self._weights(cell), self.batch, multiplies("bfloat16"), self.compiled, torch.__version__]
        what += [] if self.device == "cpu" else [self.device]
        return self.folder / f"network-{digest(what)[:16]}.json"

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Record of how the cell's network was chosen, or None."""
        path = self._record_file(cell)
        return json.loads(path.read_text()) if path.is_file() else None

    # --------------------------------------------------------------------------------------------------- images

    def cached(self, cell: Cell) -> bool:
        return (self.folder / f"{self.key(cell)}.npz").is_file()

    def shots(self, cell: Cell, tick: Any = None) -> Shots:
        """The cell's images and features, sampled unless they are cached."""

        def make() -> np.ndarray:
            schedule = self.sampler.schedule(cell.steps)
            return self.sampler.draw(
                self.rows(cell), self.network(cell), self.guidance(cell), schedule, self.batch, tick
            )

        return Shots.cached(self.folder / f"{self.key(cell)}.npz", make, self.extract)

    def real(self, name: str, turn: int = 0) -> Shots:
        """The artists' images of a captions set, which are the same for all noise sets."""
        rows = captions(name, self.images)
        key = digest(["real", turn, [astuple(a) for a in rows]])[:16]
        if key not in self._real:
            path = self.folder / f"real-{key}.npz"
            self._real[key] = Shots.cached(path, lambda: real_images(rows, self.cache, turn), self.extract)
        return self._real[key]

    def decide(self, cells: Sequence[Cell]) -> None:
        """Determine the best interval by steps and w, the one with the lowest KID, if the sweep is complete."""
        for steps, w in {(c.steps, c.w) for c in cells if c.interval == BEST}:
            sweep = [c for c in cells if c.captions == SWEEP and (c.steps, c.w) == (steps, w)]
            if (steps, w) in self.best or not sweep or not all(self.cached(c) for c in sweep):
                continue
            real = self.real(SWEEP).features
            kids = {c.interval: fidelity.kid(real, self.shots(c).features, draws=1).value for c in sweep}
            self.best[steps, w] = min(kids, key=lambda name: kids[name])

    def sample(self, cells: Sequence[Cell]) -> None:
        """Sample all missing images, with one progress bar in U-Net evaluations."""
        self.decide(cells)
        jobs: dict[str, Cell] = {}
        for cell in cells:
            # the best interval is unknown before the sweep; its images may then turn out to be cached
            jobs.setdefault(str(astuple(cell)) if self.guidance_open(cell) else self.key(cell), cell)
        work = {name: len(self.rows(c)) * self.evaluations(c) for name, c in jobs.items()}
        done = {name for name in jobs if (self.folder / f"{name}.npz").is_file()}
        bar = tqdm(
            total=sum(work.values()), initial=sum(work[n] for n in done), unit=" evaluations", unit_scale=True,
            mininterval=5,
        )  # fmt: skip
        with bar:
            for name, cell in jobs.items():
                if name in done:
                    continue
                if cell.interval == BEST:
                    self.decide(cells)
                note = f"{cell.base}, {cell.method} {cell.steps}, w = {cell.w:g}, {cell.captions} {cell.seed}"
                bar.set_description(note)
                before = bar.n
                self.shots(cell, bar.update)
                bar.update(before + work[name] - bar.n)
        self._network = None

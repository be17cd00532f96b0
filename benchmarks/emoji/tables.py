"""Tables A, B and C of the distillation on the bundled model: sample every cell, measure, write one JSON.

Every set of images is cached in ``build/emoji/tables/`` as soon as it is complete, named by the hash of weights and
settings, so that a killed run continues.  Cells without guides come first; ``--only-teacher`` samples only those.
Missing guides are left out and listed.  ``tables_report.py`` writes the document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pnp_trt.bench.measure import cost
from pnp_trt.bench.measure.networks import networks
from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.bundle.store import write_json
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.student import Student
from pnp_trt.models.teacher import BaseModel

from ..records import add_sampling_options
from . import compare
from .cells import BEST, FINE_TUNES, HEADLINE_W, INTERVALS, SCALES, TEACHER, Cell, all_cells, at_budget, spared
from .compare import Ranked
from .measures import real_ceiling
from .provenance import provenance, relative
from .runner import GUIDES, SEED_STRIDE, Runner, captions, find_guides
from .sampler import BATCH

SCHEMA = "pnp-trt/emoji-tables/2"


def costs(runner: Runner) -> dict[str, Any]:
    """MACs by network name, with and without attention products, at batch 1; a guide's row includes the U-Net."""
    counts = {
        name: cost.count(*parts) for name, parts in networks(runner.bases[TEACHER].name).items() if name != "guide-tiny"
    }
    _, inputs = networks(runner.bases[TEACHER].name)["teacher"]
    for name, guide in runner.guides.items():
        counts[name] = cost.count(Student(runner.sampler.unet, guide), {**inputs, "guidance": torch.empty(1)})
    return {name: asdict(c) for name, c in counts.items()}


def macs_per_image(cell: Cell, evaluations: int, costs_of: dict[str, Any]) -> dict[str, int]:
    """MACs of loop, text encoder and decoder, with and without attention products."""
    step = costs_of[cell.guide or "teacher"]
    parts = [costs_of[n] for n in cost.IMAGE_NETWORKS if n in costs_of]
    return {
        name: evaluations * step[key] + sum(p[key] for p in parts)
        for name, key in (
            ("macs_per_image", "macs"),
            ("macs_per_image_without_attention", "macs_without_attention"),
        )
    }


class Measurer:
    """Measures cells and groups (means over noise sets) and derives verdicts, from complete sets of images.

    Args:
        targets: steps of the CFG images that every cell is compared with, if they are in the run.
    """

    def __init__(
        self, runner: Runner, cells: Sequence[Cell], head: AlignmentHead, targets: Sequence[int] = (50,)
    ) -> None:
        self.runner, self.cells, self.targets = runner, cells, targets
        self.costs = costs(runner)
        # the same images may be in several tables, so references are looked up without the table
        self.reference = {
            (c.method, c.base, c.steps, c.w, c.captions, c.seed): c for c in cells if not c.guide and not c.interval
        }
        # keep a group and its references in memory, but not all images at once
        self.at = lru_cache(48)(
            lambda cell: Ranked.of(runner.shots(cell), [a.concept for a in runner.rows(cell)], head)
        )

    def referred(self, group: Sequence[Cell], method: str, steps: int) -> list[Ranked] | None:
        """References of a group, one per noise set; None if they are not in this run."""
        references = [self.reference.get((method, c.base, steps, c.w, c.captions, c.seed)) for c in group]
        return None if None in references else [self.at(c) for c in references]

    def about(self, group: Sequence[Cell]) -> dict[str, Any]:
        """Measures of cells that differ only in their noise."""
        first, sets, real = group[0], [self.at(c) for c in group], self.runner.real(group[0].captions)
        out = {**compare.quality(real, sets), "distance_to_cfg": {}, "gain_over_cfg": {}, "gain_over_none": None}
        for steps in dict.fromkeys((*self.targets, first.steps)):
            teacher = self.referred(group, "cfg", steps)
            if teacher is not None and (first.method, first.steps) != ("cfg", steps):
                out["distance_to_cfg"][str(steps)] = compare.distance(sets, teacher)
                out["gain_over_cfg"][str(steps)] = compare.gain(real, teacher, sets)
        plain = self.referred(group, "none", first.steps)
        if plain is not None and first.method != "none":
            out["gain_over_none"] = compare.gain(real, plain, sets)
        return out

    def told(self, cell: Cell) -> dict[str, Any]:
        """Definition and cost of a cell."""
        evaluations = self.runner.evaluations(cell)
        macs = macs_per_image(cell, evaluations, self.costs)
        out = {**asdict(cell), "guide": cell.guide, "evaluations": evaluations, **macs}
        if cell.method == "interval":
            out["timesteps"] = list(self.runner.guidance(cell).interval or ())
            out["interval_chosen"] = self.runner.best.get((cell.steps, cell.w)) if cell.interval == BEST else None
        return out

    def group(self, group: Sequence[Cell]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The measures of a group, and of each of its cells."""
        whole = self.about(group)
        about = {**self.told(group[0]), "seeds": [c.seed for c in group], **whole}
        cells = []
        for c in group:
            mine = whole if len(group) == 1 else self.about([c])
            ranks = " ".join(str(r) for r in self.at(c).ranks)
            cells.append({**self.told(c), "cache": self.runner.key(c), **mine, "ranks": ranks})
        return about, cells

    def duel(self, pair: tuple[Cell, Cell]) -> dict[str, Any]:
        """Gain of a guide over a method without training."""
        rival, guide = pair
        return compare.gain(self.runner.real("train"), [self.at(rival)], [self.at(guide)])

    def __call__(self, processes: int = 1) -> dict[str, Any]:
        members: dict[tuple[Any, ...], list[Cell]] = {}
        for c in self.cells:
            members.setdefault(c.group, []).append(c)
        sets = list(members.values())
        for name in dict.fromkeys(c.captions for c in self.cells):
            self.runner.real(name)  # once, rather than in every process
        measured = spread(self.group, sets, processes, "measuring")
        groups = [about for about, _ in measured]
        one_by_one = [cell for _, cells in measured for cell in cells]
        free = [
            (cells[0], g) for cells, g in zip(sets, groups, strict=True)
            if g["table"] == "C" and g["captions"] == "train"
        ]  # fmt: skip
        pairs = [
            ((rival, guide), (g, r))
            for guide, g in free if not guide.untrained for rival, r in free if rival.untrained and r["w"] == g["w"]
        ]  # fmt: skip
        gains = spread(self.duel, [cells for cells, _ in pairs], processes, "comparing")
        duels = [compare.free_verdict(g, r, gain) for (_, (g, r)), gain in zip(pairs, gains, strict=True)]
        verdicts = {
            "A": compare.goal_verdicts(groups, HEADLINE_W), "B": compare.transfer_verdicts(groups), "C": duels,
        }  # fmt: skip
        return {"costs": self.costs, "cells": one_by_one, "groups": groups, "verdicts": verdicts}


_WORK: Callable[[Any], Any]


def spread(work: Callable[[Any], Any], items: Sequence[Any], processes: int, name: str) -> list[Any]:
    """``[work(item) for item in items]``, in forked processes if ``processes`` is more than one.

    Data of ``work`` is inherited by the fork and not pickled; ``work`` must not use a GPU.
    """
    global _WORK
    bar = {"desc": name, "total": len(items), "mininterval": 5}
    if processes == 1:
        return [work(item) for item in tqdm(items, **bar)]
    _WORK = work
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return list(tqdm(pool.imap(_forked, items), **bar))


def _forked(item: Any) -> Any:
    return _WORK(item)


def choose_cells(
    cells: Sequence[Cell],
    only: Sequence[str],
    bases: dict[str, BaseModel],
    guides: dict[str, Path],
    missing: dict[str, str],
    light: bool = False,
    scales: Sequence[float] = SCALES,
    most_steps: int = 1000,
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """The cells that can be measured, and those left out, each with its reason."""
    selected, left = [], []
    for c in cells:
        if c.table not in only:
            reason = f"--only {','.join(only)}"
        elif c.w not in scales:
            reason = f"--scales {','.join(f'{w:g}' for w in scales)}"
        elif c.steps > most_steps:
            reason = f"--most-steps {most_steps}"
        elif light and spared(c):
            reason = "--light, which spares a third of the compute"
        elif c.base not in bases:
            reason = f"there is no base {c.base!r}"
        elif c.guide and c.guide not in guides:
            reason = missing.get(c.guide, f"there is no guide {c.guide!r}")
        else:
            selected.append(c)
            continue
        left.append({**asdict(c), "reason": reason})
    return selected, left


def evaluate(
    bases: dict[str, BaseModel], guides: dict[str, Path], judge: Path, cache: Path, results: Path, *,
    missing: dict[str, str] | None = None, images: int = 512, only: Sequence[str] = ("A", "B", "C"), seeds: int = 3,
    only_teacher: bool = False, only_guided: bool = False, light: bool = False, sampled_only: bool = False,
    scales: Sequence[float] = SCALES, most_steps: int = 1000, command: str = "",
    batch: int = BATCH, compiled: bool = True, device: str = "cpu",
    processes: int = 1,
    cells: Sequence[Cell] | None = None,
    budget: int | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Sample and measure the tables; write the record to ``results`` and return it.

    Args:
        bases, guides: see :class:`Runner`; ``missing`` has the reasons why guides are missing.
        only_teacher: sample the cells without guides, write nothing, and return None.
        only_guided: the same for cells with guides; two processes can do both at once.
        sampled_only: measure the cells that are sampled, and list the others as left out.
        light: leave out the cells of :func:`~.cells.spared`.
        processes: number of processes that measure.
        device: ``cpu`` or ``cuda``; their images differ in the last bits.
        cells: cells to measure instead of all of the tables'.
        budget: measure only the cells of Table C with this many evaluations, and their references.

    Raises:
        InputError: on values out of range.
    """
    if images < 4:
        raise InputError(f"images must be at least 4, got {images}")
    if unknown := sorted(set(only) - {"A", "B", "C"}):
        raise InputError(f"unknown table {unknown[0]!r}; available: A, B, C")
    if budget is not None:
        cells = at_budget(budget, scales)
    selected, left = choose_cells(
        cells or all_cells(seeds), only, bases, guides, missing or {}, light, scales, most_steps
    )
    head = AlignmentHead.load(judge)
    runner = Runner(bases, guides, FeatureExtractor(device), cache, images, batch, compiled, device)
    if only_teacher:
        runner.sample([c for c in selected if c.guide is None])
        return None
    if only_guided:
        runner.sample([c for c in selected if c.guide is not None])
        return None
    if sampled_only:
        runner.decide(selected)
        sampled = {c for c in selected if not runner.guidance_open(c) and runner.cached(c)}
        left += [{**asdict(c), "reason": "not sampled yet"} for c in selected if c not in sampled]
        selected = [c for c in selected if c in sampled]
    runner.sample(selected)
    runner.decide(selected)
    tuned = {n: b.unet_file for n, b in bases.items() if b.unet_file is not None}
    names = list(dict.fromkeys(c.captions for c in selected))
    targets = (50,) if budget is None else (50, budget)
    measured = Measurer(runner, selected, head, targets)(processes)
    ceilings = {}
    for name in names:
        rows = captions(name, images)
        ceilings[name] = real_ceiling(rows, runner.real(name), runner.real(name, 1), head)
        ceilings[name].pop("ranks")
    document = {
        "schema": SCHEMA,
        "provenance": provenance(bases[TEACHER].folder, tuned, head, command) | {"guides_sha256": runner.guide_hashes},
        "settings": {
            "images": images, "seeds": seeds, "only": list(only), "sampler": "DDIM, eta 0", "batch": batch,
            "seed_stride": SEED_STRIDE, "intervals": {k: list(v) for k, v in INTERVALS.items()},
            **({} if budget is None else {"budget": budget}),
        },
        "networks": {c.network: runner.record(c) for c in selected},
        "captions": {n: [" ".join(map(str, astuple(a))) for a in captions(n, images)] for n in names},
        "real": ceilings,
        **measured,
        "left_out": left,
    }  # fmt: skip
    write_json(results, document)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--guides", type=Path, help=f"a folder of guides named {', '.join(GUIDES)}; default: the bundled ones")
    add_sampling_options(parser, "number of images of trained captions for each cell", BATCH)
    add("--only", default="A,B,C", help="tables, separated by commas")
    add("--seeds", type=int, default=3, help="noise sets of the headline rows")
    add("--only-teacher", action="store_true", help="sample the cells that need no guide, and stop")
    add("--only-guided", action="store_true", help="sample the cells that need a guide, and stop")
    add("--light", action="store_true", help="leave out (and list) a third of the evaluations, but no headline rows")
    add("--scales", default=",".join(f"{w:g}" for w in SCALES), help="guidance scales, separated by commas")
    add("--budget", type=int, help="only methods without training, at this many evaluations: 50, 16, 12 or 8")
    add("--most-steps", type=int, default=1000, help="leave out cells with more steps")
    add("--sampled-only", action="store_true", help="measure the cells that are already sampled, and list the others")
    add("--json", type=Path, default=Path("benchmarks/results/emoji-tables.json"))
    add("--eager", action="store_true", help="do not compile networks")
    add("--processes", type=int, default=1, help="number of processes that measure")
    args = parser.parse_args()
    try:
        guides, missing = find_guides(args.guides)
        bases = {name: resolve(name) for name in (TEACHER, *FINE_TUNES)}
        words = ["python", "-m", "benchmarks.emoji.tables", "--images", str(args.images), "--only", args.only]
        words += ["--seeds", str(args.seeds), *(["--guides", relative(args.guides)] if args.guides else [])]
        words += ["--scales", args.scales] if args.scales != parser.get_default("scales") else []
        words += ["--light"] if args.light else []
        words += ["--budget", str(args.budget)] if args.budget is not None else []
        words += ["--most-steps", str(args.most_steps)] if args.most_steps != parser.get_default("most_steps") else []
        words += ["--device", args.device, "--batch", str(args.batch)] if args.device != "cpu" else []
        words += ["--sampled-only"] if args.sampled_only else []
        document = evaluate(
            bases, guides, args.judge, args.cache, args.json, missing=missing, images=args.images,
            only=[t.strip() for t in args.only.split(",") if t.strip()], seeds=args.seeds,
            only_teacher=args.only_teacher, only_guided=args.only_guided, light=args.light,
            sampled_only=args.sampled_only, scales=[float(w) for w in args.scales.split(",")],
            most_steps=args.most_steps, command=shlex.join(words), compiled=not args.eager,
            device=args.device, batch=args.batch, processes=args.processes, budget=args.budget,
        )  # fmt: skip
    except InputError as error:
        parser.error(str(error))
    if document is not None:
        print(json.dumps(document["verdicts"]["A"], indent=1))
        for name, why in missing.items():
            print(f"left out: {name}: {why}")


if __name__ == "__main__":
    main()

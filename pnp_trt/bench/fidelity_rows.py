"""Fidelity rows: how good images are (KID, alignment) and how close to the teacher's CFG, over steps and w."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..runtime.pipeline import Pipeline
from ..sampling.methods import CFG, GUIDED, METHODS, UNGUIDED, guided_steps
from .metric import METRICS, Images, judges_quality
from .metrics import fidelity
from .metrics.extractors import Eyes
from .metrics.tasks import Task, real_features, real_key
from .plan import Plan
from .results import encode_images
from .work import Work

#: the grid's rows, with their labels
_SHOWN = {CFG.name: "teacher, CFG", GUIDED.name: "guided", UNGUIDED.name: "no guidance"}
#: an image's side in the document, in pixels, at most
_SIDE = 160


@dataclass(frozen=True)
class Cell:
    """One set of images: what an engine generates by one method. ``guidance`` is None where the images have no w."""

    engine: str
    method: str
    steps: int
    guidance: float | None

    @property
    def label(self) -> str:
        """For people."""
        w = "" if self.guidance is None else f", w = {self.guidance:g}"
        return f"{self.engine}, {self.method}, {self.steps} steps{w}"


@dataclass(frozen=True)
class FidelityRow:
    """One row of the table: its images, and those that they are compared with.

    Attributes:
        method: as reported; ``cfg-fewer-steps`` is CFG with as many evaluations as the steps requested.
        guidance: w; of images without guidance, the w of what they are compared with.
        teacher: CFG of the same w and of the steps requested; None where there is no CFG, or it is this row.
        best: CFG of the same w at the largest number of steps; None likewise.
    """

    method: str
    guidance: float
    cell: Cell
    teacher: Cell | None
    best: Cell | None


def plan_rows(pipes: Sequence[Pipeline], plan: Plan) -> tuple[list[FidelityRow], list[dict[str, str]]]:
    """The rows that the engines can give, in the order of the tables, and what is left out and why."""
    left_out: list[dict[str, str]] = []
    teacher = next((pipe for pipe in pipes if CFG.name in pipe.methods), None)
    # the order of the tables; a method with the images of another has no row
    methods = sorted((m for m in METHODS.values() if m.images_of is None), key=lambda method: method.baseline)
    rows = []

    def cfg(steps: int, w: float) -> Cell | None:
        return None if teacher is None else Cell(teacher.name, CFG.name, steps, w)

    for w in plan.guidance:
        best = cfg(max(plan.steps), w)
        for steps in plan.steps:
            for method in methods:
                for pipe in pipes:
                    drawn, taken = method.of_pipeline, method.steps(steps)
                    if drawn not in pipe.methods + pipe.baselines:
                        continue
                    if pipe.sampling_steps not in (None, taken):
                        why = f"its guide was distilled for {pipe.sampling_steps} steps alone"
                        left_out.append({"what": f"fidelity of {pipe.name} at {steps} steps", "why": why})
                        continue
                    cell = Cell(pipe.name, drawn, taken, w if method.uses_guidance else None)
                    beside = [None if c == cell else c for c in (cfg(steps, w), best)]
                    rows.append(FidelityRow(method.name, w, cell, *beside))
    return rows, [dict(item) for item in {tuple(sorted(i.items())): i for i in left_out}.values()]


def cells_of(rows: Sequence[FidelityRow]) -> list[Cell]:
    """The sets of images that rows need, each once."""
    return list(dict.fromkeys(c for row in rows for c in (row.cell, row.teacher, row.best) if c is not None))


class Studio:
    """Generates cells, each once, and keeps them in ``work``.

    Attributes:
        task: with the real images' features, where there are any.
    """

    def __init__(self, pipes: Sequence[Pipeline], plan: Plan, task: Task, eyes: Eyes, work: Work) -> None:
        self.pipes = {pipe.name: pipe for pipe in pipes}
        self.plan, self.eyes, self.work = plan, eyes, work
        self.task = self._with_real(task)

    def _with_real(self, task: Task) -> Task:
        if task.real_folder is None or self.eyes.efficientnet is None:
            return task
        folder, extract = task.real_folder, self.eyes.efficientnet
        made = self.work.arrays("real", real_key(folder), lambda: {"features": real_features(folder, extract)})
        return replace(task, real=made["features"])

    def _key(self, cell: Cell) -> list[Any]:
        pipe = self.pipes[cell.engine]
        return [
            pipe.bundle.manifest.seal, cell.method, cell.steps, cell.guidance, self.task.key, self.plan.schedule,
            self.plan.size, self.eyes.key,
        ]  # fmt: skip

    def has(self, cell: Cell) -> bool:
        """Whether the cell's images are generated."""
        return self.work.has("cell", self._key(cell), ".npz")

    def images(self, cell: Cell, callback: Callable[[int, int], Any] | None = None) -> dict[str, np.ndarray]:
        """``pixels`` uint8 ``[N, H, W, 3]``, ``shown`` (the grid's), and what the eyes see of them, ``[N, …]`` each."""
        return self.work.arrays("cell", self._key(cell), lambda: self._draw(cell, callback))

    def _draw(self, cell: Cell, callback: Callable[[int, int], Any] | None) -> dict[str, np.ndarray]:
        task, pipe = self.task, self.pipes[cell.engine]
        drawn = pipe(
            [*task.prompts, *task.shown], steps=cell.steps, seed=[*task.seeds, *task.shown_seeds], method=cell.method,
            guidance=self.plan.guidance[0] if cell.guidance is None else cell.guidance, schedule=self.plan.schedule,
            size=self.plan.size, callback=callback,
        )  # fmt: skip
        pixels = np.stack([p.pixels for p in drawn])
        measured = pixels[: len(task.prompts)]
        return {"pixels": measured, "shown": pixels[len(task.prompts) :], **self.eyes.look(measured, task.prompts)}

    # ------------------------------------------------------------------------------------------------- measures

    def measure(self, row: FidelityRow, cost: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """A row of the document."""
        cell, mine = row.cell, self.images(row.cell)
        evaluations = self._evaluations(cell)
        found: dict[str, Any] = {
            "engine": cell.engine, "method": row.method, "steps": cell.steps, "guidance": row.guidance,
            "evaluations": evaluations, "images": len(mine["pixels"]),
            "macs_per_image": macs_per_image(cost, evaluations, cell.steps, self._guide(cell)),
        }  # fmt: skip
        images = self._images(cell, row)
        for metric in METRICS.values():
            if (value := metric.compute(images)) is not None:
                found[metric.key] = value.as_dict()
        if row.teacher is not None:
            found["reference_steps"] = row.teacher.steps
        return found

    def _images(self, cell: Cell, row: FidelityRow | None = None) -> Images:
        """A cell as metrics read it; with a row, beside those that it is compared with."""
        mine, folder = self.images(cell), self.task.real_folder
        return Images(
            mine["pixels"], self.task.prompts, {k: v for k, v in mine.items() if k not in ("pixels", "shown")},
            self.task.concepts,
            cfg=None if row is None or row.teacher is None else self._images(row.teacher),
            best_cfg=None if row is None or row.best is None else self._images(row.best),
            real=self.task.real, real_inception=None if folder is None else self._real_inception,
            judge=lambda: self.eyes.judge,
        )  # fmt: skip

    def _real_inception(self) -> np.ndarray:
        folder, extract = self.task.real_folder, self.eyes.inception
        assert folder is not None and extract is not None  # the plan was checked
        key = [real_key(folder), self.eyes.key]
        return self.work.arrays("real-inception", key, lambda: {"features": real_features(folder, extract)})["features"]

    def _evaluations(self, cell: Cell) -> int:
        """U-Net evaluations of an image."""
        method, inside = METHODS.get(cell.method), None
        pipe = self.pipes[cell.engine]
        if method.has_interval:
            table = pipe.schedule(cell.steps, self.plan.schedule)
            inside = int(guided_steps(table, pipe.guided_interval()).sum())
        return method.evaluations(pipe.evaluations(cell.steps, self.plan.schedule), inside)

    def _guide(self, cell: Cell) -> str | None:
        """The counted network that stands for the engine's guide; "" where there is no guide, None where unknown."""
        from .engines import counted_guide

        return counted_guide(self.pipes[cell.engine].bundle.manifest)

    # -------------------------------------------------------------------------------------------------- images

    def grid(self, rows: Sequence[FidelityRow]) -> dict[str, Any]:
        """The document's images: teacher, guided and unguided, by steps and w; the headline's rows come first."""
        shown_first = list(_SHOWN)
        order = sorted((r for r in rows if r.method in _SHOWN), key=lambda r: (
            r.guidance != self.plan.guidance[0], -r.cell.steps, shown_first.index(r.method)))  # fmt: skip
        shown = {row.cell: row for row in reversed(order)}
        made = [
            {
                "label": _label(row, self._evaluations(row.cell)), "engine": row.cell.engine, "method": row.method,
                "steps": row.cell.steps, "guidance": row.cell.guidance,
                "pixels": _small(self.images(row.cell)["shown"]),
            }
            for row in order if shown[row.cell] is row
        ]  # fmt: skip
        steps = " and ".join(map(str, sorted({row.cell.steps for row in order})))
        caption = f"{steps} steps"
        if self.task.columns != self.task.shown:  # the bundled prompts, all of one style
            caption = f"{self.task.shown[0].rpartition(', ')[2]}, {caption}"
        return {"columns": list(self.task.columns), "rows": encode_images(made), "caption": caption}


def _label(row: FidelityRow, evaluations: int) -> str:
    name = _SHOWN[row.method]
    w = "" if row.cell.guidance is None else f", w = {row.cell.guidance:g}"
    return f"{name}\n{row.cell.steps} steps, {evaluations} NFE{w}"


def _small(pixels: np.ndarray) -> np.ndarray:
    """Images ``[N, H, W, 3]`` reduced until no side is longer than ``_SIDE``."""
    height, width = pixels.shape[1:3]
    scale = _SIDE / max(height, width)
    if scale >= 1:
        return pixels
    from PIL import Image

    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in pixels])


def macs_per_image(cost: Sequence[Mapping[str, Any]], evaluations: int, steps: int, guide: str | None) -> int | None:
    """MACs of a whole image, attention products included; None where its networks were not counted.

    Args:
        cost: rows of ``cost.cost_rows``.
        evaluations: of the U-Net.
        guide: the counted guide that runs once a step, "" for none, None where it is unknown.
    """
    from .measure.cost import CONDITION_PREFIX, IMAGE_NETWORKS

    macs = {row["network"]: int(row["macs"]) for row in cost}
    if "teacher" not in macs or guide is None or (guide and guide not in macs):
        return None
    once = sum(macs.get(name, 0) for name in IMAGE_NETWORKS)
    if guide:
        once += macs.get(CONDITION_PREFIX + guide.removeprefix("guide-"), 0)
    return evaluations * macs["teacher"] + (steps * macs[guide] if guide else 0) + once


def verdict(rows: Sequence[Mapping[str, Any]], task: Task | None, eyes: Eyes | None) -> tuple[bool, str | None]:
    """Whether rows say how good the images are; if not, why."""
    if any(judges_quality(row) for row in rows):
        return True, None
    if task is None or eyes is None:
        return False, "the fidelity part was not run"
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return False, f"the image metrics are not installed; install them with: {fidelity.INSTALL}"
    return False, task.reason or "no engine generated images"

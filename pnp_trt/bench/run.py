"""`pnp-trt bench`: measure cost, latency and fidelity, and put them into one results document."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle.manifest import Manifest
from ..bundle.store import cached_sha256, find_bundle, read_manifest
from ..errors import InputError, PnpError
from ..io.progress import Progress
from ..runtime.pipeline import Pipeline
from ..sampling.methods import CFG, GUIDED, INTERVAL, guided_steps
from ..sampling.schedules import ddim
from ..sampling.step_loop import SLOTS
from ..version import __version__
from . import results
from .fidelity_rows import Cell, Studio, cells_of, plan_rows, verdict
from .measure import cost, serving
from .measure.engine_facts import engine_rows
from .measure.pace import ProgressMeter, about
from .measure.timing import Timing
from .metrics.tasks import make_task, real_key
from .plan import Plan, check, engines_of
from .work import Work


def identity(plan: Plan) -> dict[str, Any]:
    """Return everything that determines a run: plan, seals of the engines, hashes of user files, package version.

    Raises:
        InputError: for an unknown or damaged engine.
    """
    base_of(plan)
    settings = {
        **plan.as_dict(),
        "package": __version__,
        "seals": {name: read_manifest(find_bundle(name)).seal for name in engines_of(plan)},
    }
    for name in ("prompts", "inception"):
        if (value := getattr(plan, name)) is not None:
            settings[name] = cached_sha256(Path(value))
    if plan.real is not None:
        settings["real"] = real_key(Path(plan.real))
    if plan.clip is not None:
        settings["clip"] = [cached_sha256(p) for p in sorted(Path(plan.clip).glob("*.safetensors"))]
    return settings


def base_of(plan: Plan) -> str:
    """Return the base model of a run: that of the engines, if there are any, otherwise the plan's.

    Raises:
        InputError: as :func:`identity` does.
    """
    engines = engines_of(plan)
    return _same_base(engines).base.name if engines else plan.base


def run(
    plan: Plan,
    *,
    command: Sequence[str],
    suite: str | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """Measure, and return the results document.

    Args:
        command: the arguments of the command line, for the provenance.
        suite: name of the suite that the plan comes from.
        progress: called with the current activity, and the seconds of the estimate that are done and in total.
        notify: called with sentences for the user, such as the estimate before the start.
        work: store of the finished pieces; None uses a temporary one.

    Raises:
        InputError: for unknown or damaged engines, or engines of different bases.
    """
    check(plan)
    if work is None:
        with Work(None, {}) as temporary:
            return run(plan, command=command, suite=suite, progress=progress, notify=notify, work=temporary)
    bench = _Bench(plan, work, progress, notify or (lambda sentence: None))
    return bench.document(["pnp-trt", *command], suite)


class _Bench:
    """One run; the constructor opens the engines."""

    def __init__(self, plan: Plan, work: Work, progress: Progress | None, notify: Callable[[str], None]) -> None:
        self.base = base_of(plan)
        self.pipes = [Pipeline.load(name, provider=plan.provider) for name in engines_of(plan)]
        for pipe in self.pipes:
            pipe.check_size(plan.size)
        self.plan = replace(plan, schedule=_common_schedule(self.pipes, plan.schedule))
        self.work, self._progress, self._notify = work, progress, notify
        self.left_out: list[dict[str, str]] = []
        self.timing = Timing(self.pipes, self.plan, self.base, work)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self._drawn: dict[str, Any] = {}

    def document(self, command: Sequence[str], suite: str | None) -> dict[str, Any]:
        """Measure all parts and return the results document."""
        plan = self.plan
        if "cost" in plan.parts:
            self._cost()
            self.rows["engines"] = engine_rows([pipe.bundle.folder for pipe in self.pipes], self.pipes)
        self._prepare()
        if "latency" in plan.parts:
            self.rows["cold_start"] = self.timing.cold_starts(self.meter)
            self.rows["latency"] = self.timing.measure(self.meter, self.rows.get("cost", ()))
        self.left_out += self.timing.left_out
        if "serving" in plan.parts:
            self.rows["serving"] = self._serving()
        evaluated, reason, images = self._quality_of_images()
        names = [pipe.name for pipe in self.pipes]
        settings = {**plan.as_dict(), "suite": suite, "base": self.base, "engines": names, **self._drawn}
        parts = ("cost", "methods_cost", "published", "engines", "latency", "cold_start", "serving", "fidelity")
        tables: dict[str, Any] = {name: self.rows.get(name, []) for name in parts}
        return results.document(
            command, settings=settings, task_quality_evaluated=evaluated, task_quality_reason=reason,
            images=images, left_out=self.left_out, device=self.timing.device, **tables,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- estimate

    def _prepare(self) -> None:
        """Estimate the duration from a short trial of every method, and report it."""
        parts = [p for p in ("latency", "serving", "fidelity") if p in self.plan.parts]
        jobs: dict[str, float] = {}
        finished = 0
        if parts:
            self.timing.try_out(self._report)
        if "latency" in parts:
            jobs |= self.timing.jobs()
            finished += self.timing.resumed()
        if "serving" in parts:
            jobs |= {_queues(pipe): self._serving_seconds(pipe) for pipe in self._servers()}
            finished += sum(self.work.has("serving", self._serving_key(pipe)) for pipe in self._servers())
        if "fidelity" in parts:
            self._plan_fidelity()
            jobs |= {cell.label: self._drawing_seconds(cell) for cell in self.cells}
            finished += sum(self.studio.has(c) for c in self.cells)
        self.meter = ProgressMeter(jobs, self._progress)
        if parts:
            resumed = f"; {finished} of its {len(jobs)} pieces are finished already" if finished else ""
            self._notify(f"this run takes {about(self.meter.total)} in all{resumed}")

    def _drawing_seconds(self, cell: Cell) -> float:
        task, pipe = self.studio.task, self.studio.pipes[cell.engine]
        count = len(task.prompts) + len(task.shown)
        most = pipe.largest_batch(self.plan.size)
        pace = self.timing.paces[f"{cell.engine}/{cell.method}"]
        batches = [most] * (count // most) + ([count % most] if count % most else [])
        return sum(pace.seconds(b, cell.steps) for b in batches) + count * self.looking

    # ------------------------------------------------------------------------------------------------- serving

    def _servers(self) -> list[Pipeline]:
        """Engines with a guide; raise ``InputError`` if there are none."""
        guided = [pipe for pipe in self.pipes if pipe.bundle.guided]
        if not guided:
            raise InputError(
                f"there is no guide in {', '.join(pipe.name for pipe in self.pipes)}, but --only serving compares "
                "guided images with CFG images on one engine; name an engine with a guide"
            )
        return guided

    def _serving_seconds(self, pipe: Pipeline) -> float:
        pace = self.timing.paces[f"{pipe.name}/{GUIDED.name}"]
        calls = sum(pace.seconds(n, 2 * serving.TIMED_STEPS) for n in range(1, SLOTS + 1))
        return self.plan.rounds * calls + _QUEUED * self.plan.requests * sum(self.plan.steps) / len(self.plan.steps)

    def _serving_key(self, pipe: Pipeline) -> list[Any]:
        plan = self.plan
        return [pipe.bundle.manifest.seal, plan.rounds, plan.requests, plan.steps, plan.guidance, plan.provider]

    def _serving(self) -> list[dict[str, Any]]:
        """Rows of the document's ``serving``."""
        rows = []
        for pipe in self.pipes:
            if not pipe.bundle.guided:
                self._leave_out(f"serving of {pipe.name}", "it has no guide whose images could be compared with CFG's")
        for pipe in self._servers():
            job = _queues(pipe)
            self.meter.begin(job, job)

            def make(pipe: Pipeline = pipe) -> dict[str, Any]:
                plan = self.plan
                return serving.measure(
                    pipe, rounds=plan.rounds, requests=plan.requests, steps=plan.steps, guidance=plan.guidance,
                    progress=self.meter.within,
                )  # fmt: skip

            row, earlier = self.work.table("serving", self._serving_key(pipe), make)
            rows.append(row)
            self.meter.end(job, resumed=earlier)
        return rows

    # --------------------------------------------------------------------------------------------------- cost

    def _cost(self) -> None:
        if importlib.util.find_spec("torch") is None:
            self._leave_out("cost", "counting needs torch and diffusers; install with: pip install 'pnp-trt[build]'")
            return
        from .measure.networks import networks

        self._report("counting cost")
        try:
            self.rows["cost"] = cost.cost_rows(networks(self.base))
        except PnpError as e:
            if not self.pipes:
                raise
            self._leave_out("cost", f"the engines' base model is not available ({e})")
            return
        steps = max(self.plan.loops)
        guided = next((self._guided_steps(pipe, steps) for pipe in self.pipes if INTERVAL.name in pipe.baselines), None)
        evaluations = functools.partial(self.pipes[0].evaluations, schedule=self.plan.schedule) if self.pipes else int
        self.rows["methods_cost"] = cost.method_rows(
            self.rows["cost"], steps=steps, guided_steps=guided, evaluations=evaluations
        )
        self.rows["published"] = cost.published_rows(self.base, self.rows["cost"])

    def _guided_steps(self, pipe: Pipeline, steps: int) -> int:
        """Number of steps in which ``cfg-interval`` evaluates the teacher twice."""
        return int(guided_steps(pipe.schedule(steps, self.plan.schedule), pipe.guided_interval()).sum())

    def _report(self, what: str) -> None:
        """Report progress before the estimate is known."""
        if self._progress is not None:
            self._progress(what, 0, 1)

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out.append({"what": what, "why": why})

    # ------------------------------------------------------------------------------------------------ fidelity

    def _plan_fidelity(self) -> None:
        from .metrics.extractors import Eyes

        task, eyes = make_task(self.plan, self.base), Eyes(self.plan)
        self.looking = eyes.pace(self.pipes[0].size if self.plan.size is None else self.plan.size)
        self.studio = Studio(self.pipes, self.plan, task, eyes, self.work)
        self.planned, left_out = plan_rows(self.pipes, self.plan)
        self.left_out += left_out
        self.cells = cells_of(self.planned)

    def _quality_of_images(self) -> tuple[bool, str | None, Mapping[str, Any] | None]:
        """Return whether quality was measured, if not why, and the images."""
        if "fidelity" not in self.plan.parts:
            self.rows["fidelity"] = []
            return False, f"the fidelity part was not run (--only {self.plan.only})", None
        from .metrics.fidelity import EXTRACTOR

        studio = self.studio
        for cell in self.cells:
            resumed = studio.has(cell)
            self.meter.begin(cell.label, f"generating {cell.label}")
            studio.images(cell, self.meter.within)
            self.meter.end(cell.label, resumed=resumed)
        if self._progress is not None:
            self._progress("measuring the images", round(self.meter.total), round(self.meter.total))
        rows = [studio.measure(row, self.rows.get("cost", ())) for row in self.planned]
        # drop CFG rows without any metric; at the largest number of steps CFG has a KID if there are real images
        self.rows["fidelity"] = [r for r in rows if r["method"] != CFG.name or set(r) - _BARE]
        evaluated, reason = verdict(self.rows["fidelity"], studio.task, studio.eyes)
        if reason is not None:
            self._leave_out("quality of the images", reason)
        real = studio.task.real
        self._drawn = {"drawn": {
            "prompts": studio.task.source, "images": len(studio.task.prompts), "first_seed": studio.task.seeds[0],
            "real_images": None if real is None else len(real), "extractor": EXTRACTOR,
        }}  # fmt: skip
        return evaluated, reason, studio.grid(self.planned) if self.planned else None


#: guess for the estimate: seconds that all queues together take per step of a request
_QUEUED = 1e-3


def _queues(pipe: Pipeline) -> str:
    return f"queues of requests, {pipe.name}"


#: fields that a fidelity row has even if no metric was computed
_BARE = {"engine", "method", "steps", "guidance", "evaluations", "images", "macs_per_image", "reference_steps"}


def _common_schedule(pipes: Sequence[Pipeline], requested: str | None) -> str | None:
    """One schedule for all engines, so that only methods differ: the requested one, their common default, or DDIM."""
    names = {pipe.schedule(1, requested).name for pipe in pipes}
    return names.pop() if len(names) == 1 else ddim.name if names else None


def _same_base(names: Sequence[str]) -> Manifest:
    """Return the first engine's manifest; raise ``InputError`` unless all engines have the same base model."""
    bases: dict[str, list[str]] = {}
    manifests = [read_manifest(find_bundle(name)) for name in names]
    for name, manifest in zip(names, manifests, strict=True):
        bases.setdefault(manifest.base.sha256["all"], []).append(name)
    if len(bases) > 1:
        groups = " and ".join(", ".join(group) for group in bases.values())
        raise InputError(
            f"these engines have different base models and cannot be compared: {groups}; benchmark each base separately"
        )
    return manifests[0]

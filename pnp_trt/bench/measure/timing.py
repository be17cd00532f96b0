"""The latency part of a run: blocks of batch size and steps, peers, cold start, and the device's peaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...bundle.store import find_bundle
from ...errors import PnpError
from ...runtime.pipeline import Pipeline
from ...sampling.methods import CFG
from ..metrics.tasks import PROMPTS, STYLES
from ..plan import Plan
from ..work import Work
from . import coldstart, footprint, latency, peers, roofline
from .cases import Case, cases_of
from .energy import nvml_counter
from .meters import Meters
from .pace import Pace, ProgressMeter, trial

#: prompts of the timed loop
TIMED = [f"{p}, {STYLES[0]} style" for p in PROMPTS]
#: rough estimates, in seconds: a process that loads an engine and generates an image, and measuring the peaks
_PROCESS, _PEAKS = 3.0, 3.0


class Timing:
    """Times every method of the engines, and of the peers that are installed.

    Attributes:
        cases: the cases to time.
        left_out: ``{"what", "why"}`` of everything that could not be measured.
        device: the document's ``device``, once measured.
    """

    def __init__(self, pipes: Sequence[Pipeline], plan: Plan, base: str, work: Work) -> None:
        self.pipes, self.plan, self.work = pipes, plan, work
        self.left_out: list[dict[str, str]] = []
        self.device: dict[str, Any] | None = None
        self.engine_cases = cases_of(pipes)
        self._others = self._peers(base)
        self.cases = [*self.engine_cases, *self._others]
        self.paces: dict[str, Pace] = {}

    def _peers(self, base: str) -> list[Case]:
        if "latency" not in self.plan.parts or not self.pipes:
            return []
        if not self.plan.peers:
            self._leave_out("peers (diffusers, optimum-onnx)", "excluded by this run's settings")
            return []
        if not any(CFG.name in pipe.methods for pipe in self.pipes):
            self._leave_out(
                "peers (diffusers, optimum-onnx)", "none of the engines runs CFG, which they would be compared with"
            )
            return []
        plain = next(pipe for pipe in self.pipes if CFG.name in pipe.methods)
        provider = "cuda" if plain.on_gpu else "cpu"
        precision = plain.bundle.manifest.precision if plain.on_gpu else "fp32"
        kinds = [k for k in peers.KINDS if precision in ("fp32", "fp16", "bf16")]
        try:
            cases, left_out = peers.available(
                base, kinds=kinds, provider=provider, precision=precision, weights=plain.base
            )
        except PnpError as e:
            self._leave_out("peers (diffusers, optimum-onnx)", f"the engines' base model is not available ({e})")
            return []
        self.left_out += left_out
        return cases

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out.append({"what": what, "why": why})

    # ------------------------------------------------------------------------------------------------- estimate

    def try_out(self, say: Callable[[str], None]) -> None:
        """Measure the pace of every method; a peer that fails in its first step is left out.

        Peers are assumed to be as fast as CFG, as compiling one for another batch size takes minutes.
        """
        say("trying every method, for an estimate")
        for case in self.engine_cases:
            self.paces[case.label] = trial(case, TIMED, self.plan.guidance[0], self._largest(case.pipe))
        cfg = next((self.paces[c.label] for c in self.engine_cases if c.method == CFG.name), Pace(0.0, 0.0))
        for case in self._others:
            say(f"trying {case.method}, which may compile first")
            try:
                self._one_step(case)
            except Exception as e:  # a peer's own code: its failure must not end our measurement
                reason = (str(e).splitlines() or ["no reason given"])[0]
                self._leave_out(case.method, f"it failed in its first step ({type(e).__name__}: {reason})")
                self.cases.remove(case)
            else:
                self.paces[case.label] = cfg

    def _one_step(self, case: Case) -> None:
        plan, batch = self.plan, self.plan.batches[0]
        noise = case.pipe.noise(list(range(batch)), *([] if plan.size is None else [plan.size]))
        context = case.pipe.encode((TIMED * batch)[:batch])
        case.pipe.decode(case.denoise(context, noise, steps=1, guidance=plan.guidance[0], schedule=plan.schedule))

    def jobs(self) -> dict[str, float]:
        """Return the estimated seconds by name of the job."""
        plan, seconds = self.plan, {"device": _PEAKS}
        for pipe in self.pipes if plan.cold_starts else ():
            seconds[_start(pipe)] = 2 * (plan.cold_starts + 1) * _PROCESS
        for steps, batch in self.blocks():
            cases = self._cases(batch)
            loops = sum(self.paces[c.label].seconds(batch, steps) for c in cases)
            seconds[_block(steps, batch)] = (plan.rounds + plan.warmup) * loops + _PROCESS * len(cases) * plan.memory
        return seconds

    def resumed(self) -> int:
        """Return the number of jobs that an earlier process finished."""
        starts = sum(self.work.has("start", self._start_key(pipe)) for pipe in self.pipes)
        device = self.work.has("device", self._device_key())
        return device + starts + sum(self.work.has("latency", self._key(s, b)) for s, b in self.blocks())

    def blocks(self) -> list[tuple[int, int]]:
        """Steps and batch size of every block."""
        return [(steps, batch) for steps in self.plan.loops for batch in self.plan.batches if self._cases(batch)]

    def _cases(self, batch: int) -> list[Case]:
        size = self.plan.size
        return [c for c in self.cases if not isinstance(c.pipe, Pipeline) or batch in c.pipe.legal_batches(size)]

    def _largest(self, pipe: Any) -> int:
        """The largest batch size that can be timed; peers support any."""
        return pipe.largest_batch(self.plan.size) if isinstance(pipe, Pipeline) else max(self.plan.batches)

    # ------------------------------------------------------------------------------------------------- measuring

    def cold_starts(self, meter: ProgressMeter) -> list[dict[str, Any]]:
        """Measure the rows of the document's ``cold_start``."""
        rows = []
        if not self.plan.cold_starts:
            self._leave_out("cold start", "excluded by this run's settings")
            return []
        for pipe in self.pipes:
            meter.begin(_start(pipe), f"starting {pipe.name} cold")

            def make(pipe: Pipeline = pipe) -> dict[str, Any]:
                return coldstart.measure(
                    str(find_bundle(str(pipe.bundle.folder))), rounds=self.plan.cold_starts,
                    provider=self.plan.provider, progress=meter.within,
                )  # fmt: skip

            row, earlier = self.work.table("start", self._start_key(pipe), make)
            rows.append({**row, "engine": pipe.name})
            meter.end(_start(pipe), resumed=earlier)
        return rows

    def measure(self, meter: ProgressMeter, cost: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Measure the rows of the document's ``latency``, block by block.

        A block's rounds are never split between processes, so that its ratios stay paired.
        """
        plan = self.plan
        meters = self._meters(meter, cost)
        rows = []
        for pipe in self.pipes:
            if unsupported := [b for b in plan.batches if b not in pipe.legal_batches(plan.size)]:
                names = ", ".join(p.name for p in pipe.profiles)
                why = (
                    f"the engine has the profiles {names}"
                    if names
                    else f"it supports batch sizes up to {pipe.max_batch}"
                )
                self._leave_out(f"latency of {pipe.name} at batch {' and '.join(map(str, unsupported))}", why)
        for steps, batch in self.blocks():
            job = _block(steps, batch)
            meter.begin(job, f"timing, batch {batch}, {steps} steps")

            def make(steps: int = steps, batch: int = batch) -> dict[str, Any]:
                memory = footprint.MemoryMeter(plan.provider)
                block = latency.measure(
                    self._cases(batch), batches=(batch,), steps=steps, rounds=plan.rounds, warmup=plan.warmup,
                    guidance=plan.guidance[0], prompts=TIMED, schedule=plan.schedule, size=plan.size,
                    progress=lambda done, total, what: meter.within(done, total),
                    meters=Meters(memory if plan.memory else None, meters.counter, meters.device, meters.work),
                )  # fmt: skip
                return {"rows": [row.as_dict() for row in block], "left_out": memory.left_out}

            results, earlier = self.work.table("latency", self._key(steps, batch), make)
            self.left_out += results["left_out"]
            rows += [{**row, "resumed": earlier} for row in results["rows"]]
            meter.end(job, resumed=earlier)
        return rows

    def _meters(self, meter: ProgressMeter, cost: Sequence[Mapping[str, Any]]) -> Meters:
        """Return the meters for measurements besides times; list those that are unavailable in ``left_out``."""
        if not self.plan.memory:
            self._leave_out("peak memory", "excluded by this run's settings")
        counter = None
        if any(getattr(c.pipe, "on_gpu", False) for c in self.cases):
            counter, why = nvml_counter()
            if why is not None:
                self._leave_out("energy per image", why)
        else:
            self._leave_out("energy per image", "it is read from a GPU's counter, but nothing ran on a GPU")
        if not cost:
            self._leave_out("least time on this device", "the networks' cost was not counted in this run")
        return Meters(None, counter, self._peaks(meter), roofline.work_of(cost) if cost else None)

    def _peaks(self, meter: ProgressMeter) -> roofline.Device:
        """Measure the device's peaks, on a GPU in the engines' precision."""
        meter.begin("device", "measuring the device's peaks")
        provider, precision = self._device_key()
        peaks, earlier = self.work.table(
            "device", [provider, precision],
            lambda: asdict(roofline.measure_device(provider=provider, precision=precision)),
        )  # fmt: skip
        device = roofline.Device(**peaks)
        self.device = device.as_dict()
        meter.end("device", resumed=earlier)
        return device

    # ------------------------------------------------------------------------------------------------------ keys

    def _device_key(self) -> list[str]:
        pipe = self.pipes[0]
        precision = pipe.bundle.manifest.precision
        return ["cuda", precision if precision in ("fp16", "bf16") else "fp32"] if pipe.on_gpu else ["cpu", "fp32"]

    def _start_key(self, pipe: Pipeline) -> list[Any]:
        return [pipe.bundle.manifest.seal, self.plan.cold_starts, self.plan.provider]

    def _key(self, steps: int, batch: int) -> list[Any]:
        plan = self.plan
        seals = {pipe.name: pipe.bundle.manifest.seal for pipe in self.pipes}
        return [
            steps, batch, plan.rounds, plan.warmup, plan.guidance[0], plan.schedule, plan.size, plan.provider,
            plan.memory, seals, [c.label for c in self._cases(batch)],
        ]  # fmt: skip


def _block(steps: int, batch: int) -> str:
    return f"timing, batch {batch}, {steps} steps"


def _start(pipe: Pipeline) -> str:
    return f"cold start of {pipe.name}"

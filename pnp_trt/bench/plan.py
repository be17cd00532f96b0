"""The plan of a bench run, and checks that reject an invalid plan before anything is built."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle.profiles import Size
from ..errors import InputError, MissingDependency
from ..io.inputs import is_file, is_folder
from ..runtime.pipeline import GUIDANCE, STEPS
from .engines import engine_names

#: the parts of a run by default, and those that run only when requested with --only
PARTS, ALONE = ("cost", "latency", "fidelity"), ("serving",)
#: default number of images per fidelity cell: if their quality can be judged, and if not
IMAGES, IMAGES_UNJUDGED = 256, 32
#: settings of ``--quick`` that replace the defaults
QUICK: dict[str, Any] = {
    "batches": (1, 4), "steps": (4, 8), "timed_steps": (4,), "rounds": 5, "warmup": 1, "guidance": (3.0,),
    "images": 32, "peers": False, "memory": False, "cold_starts": 1,
    "requests": 200,
}  # fmt: skip
_IMAGES = (2, 50_000)
_REQUESTS = (20, 100_000)
_BATCHES = (1, 32)
MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class Plan:
    """The plan of a bench run.

    Attributes:
        engines: bundles to compare; if empty, the base's plain and guided engines.
        base: base model whose networks are counted, and whose engines are the default.
        only: one of :data:`PARTS` or :data:`ALONE`; None for all of ``PARTS``.
        quick: whether :data:`QUICK` replaced the defaults.
        batches: batch sizes to time.
        steps: sampling steps of the images, and of the timed loop if ``timed_steps`` is empty.
        timed_steps: sampling steps of the timed loop.
        rounds: interleaved rounds of a timed block.
        warmup: runs of every case before the first round.
        guidance: scales w of the images; the timed loop uses the first.
        images: images per fidelity cell; None means 256 if their quality can be judged, otherwise 32.
        provider: ``auto``, ``cpu`` or ``cuda``.
        size: height and width in pixels; None for the engines' default.
        schedule: one of ``SCHEDULES``, or ``teacher``; None for the engines' common schedule, or DDIM if they
            differ.
        prompts: a text file with one prompt per line, to use instead of the bundled captions.
        real: a folder of real images to compare the generated images with.
        inception: Inception weights (``.safetensors``) for the standard FID.
        clip: a transformers CLIP folder for the CLIP score.
        peers: whether to time other toolkits that are installed.
        memory: whether to measure peak memory, in a separate process for every row.
        cold_starts: number of timed starts of a new process per engine.
        requests: number of requests in each queue of the serving part.
    """

    engines: tuple[str, ...] = ()
    base: str = "emoji"
    only: str | None = None
    quick: bool = False
    batches: tuple[int, ...] = (1, 4, 8)
    steps: tuple[int, ...] = (8, 20)
    timed_steps: tuple[int, ...] = ()
    rounds: int = 12
    warmup: int = 2
    guidance: tuple[float, ...] = (3.0, 2.0, 5.0)
    images: int | None = None
    provider: str = "auto"
    size: Size | None = None
    schedule: str | None = None
    prompts: str | None = None
    real: str | None = None
    inception: str | None = None
    clip: str | None = None
    peers: bool = True
    memory: bool = True
    cold_starts: int = 5
    requests: int = 1000

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that will run."""
        return PARTS if self.only is None else (self.only,)

    @property
    def loops(self) -> tuple[int, ...]:
        """Sampling steps of the timed loops."""
        return self.timed_steps or self.steps

    def as_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def check(plan: Plan) -> None:
    """Raise ``InputError`` for values out of range, before anything is built."""
    if plan.only is not None and plan.only not in PARTS + ALONE:
        raise InputError(f"--only is '{plan.only}'; known: {', '.join(PARTS + ALONE)}")
    if plan.base.startswith("random:") and plan.only != "cost":
        raise InputError(f"base '{plan.base}' has no weights to run; add --only cost")
    for name, values, (low, high) in (
        ("steps", plan.steps, STEPS), ("timed-steps", plan.timed_steps, STEPS), ("guidance", plan.guidance, GUIDANCE),
    ):  # fmt: skip
        for value in values:
            if not low <= value <= high:  # also refuses NaN
                raise InputError(f"{name} is {value:g}; it must be between {low:g} and {high:g}")
    if any(not _BATCHES[0] <= b <= _BATCHES[1] for b in plan.batches):
        raise InputError(
            f"batch sizes are {', '.join(map(str, plan.batches))}; each must be between {_BATCHES[0]} and {_BATCHES[1]}"
        )
    for name in ("batches", "steps", "guidance"):
        if not getattr(plan, name):
            raise InputError(f"{name} is empty; give at least one value")
    for name in ("engines", "batches", "steps", "timed_steps", "guidance"):
        values = getattr(plan, name)
        if twice := next((v for v in values if values.count(v) > 1), None):
            raise InputError(f"{name} names {twice} twice; name each value once")
    if not 1 <= plan.rounds <= MOST_ROUNDS or not 0 <= plan.warmup <= MOST_ROUNDS:
        raise InputError(
            f"rounds is {plan.rounds} and warmup {plan.warmup}; rounds must be at least 1, warmup at least 0, "
            f"and both at most {MOST_ROUNDS:,}"
        )
    if not 0 <= plan.cold_starts <= 1000:
        raise InputError(f"cold-starts is {plan.cold_starts}; it must be between 0 and 1000")
    if not _REQUESTS[0] <= plan.requests <= _REQUESTS[1]:
        raise InputError(
            f"requests is {plan.requests}; it must be between {_REQUESTS[0]} and {_REQUESTS[1]:,} for each queue"
        )
    if plan.images is not None and not _IMAGES[0] <= plan.images <= _IMAGES[1]:
        raise InputError(f"images is {plan.images}; it must be between {_IMAGES[0]} and {_IMAGES[1]:,}")
    if plan.size is not None and plan.only == "serving":
        raise InputError("serving is measured at the engine's own size; leave --size out")
    if plan.size is not None and "cost" in plan.parts:
        raise InputError(
            "cost is counted at the model's own size; if you use --size, add --only latency or --only fidelity"
        )
    if "cost" in plan.parts and plan.only == "cost" and importlib.util.find_spec("torch") is None:
        raise MissingDependency("counting cost needs torch and diffusers; install with: pip install 'pnp-trt[build]'")
    _check_files(plan)


def _check_files(plan: Plan) -> None:
    named = {k: getattr(plan, k) for k in ("prompts", "real", "inception", "clip") if getattr(plan, k) is not None}
    if named and "fidelity" not in plan.parts:
        raise InputError(f"--{next(iter(named))} is for the fidelity part, but --only is '{plan.only}'; leave one out")
    for name, value in named.items():
        folder = name in ("real", "clip")
        path = Path(value)
        if not (is_folder(path) if folder else is_file(path)):
            raise InputError(f"--{name} {value} is not a {'folder' if folder else 'file'}; name one that exists")
    if plan.inception is not None and plan.real is None:
        raise InputError("--inception measures a distance to real images, but none are named; add --real DIR")
    if plan.real is not None and plan.prompts is None:
        raise InputError("--real needs the prompts that its images show; add --prompts FILE")


def engines_of(plan: Plan) -> tuple[str, ...]:
    """Engines to open: those named, or else the base's plain and guided engines (for serving, the guided one only)."""
    if plan.only == "cost":
        return ()
    plain, guided = engine_names(plan.base)
    return plan.engines or ((guided,) if plan.only == "serving" else (plain, guided))

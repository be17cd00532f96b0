"""`pnp-trt bench`: cost, latency and fidelity put together into one results document."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import find_bundle, read_manifest
from ..backends.profiles import Size
from ..errors import InputError
from ..runtime.pipeline import GUIDANCE, STEPS, Pipeline
from .engines import engine_names

PARTS = ("cost", "latency", "fidelity")
#: prompts of the pictures and of the timed loop; the first eight fill the grid
PROMPTS = (
    "red apple", "red heart", "automobile", "tulip", "house", "cactus", "ghost", "mushroom",
    "grinning face", "crown", "banana", "strawberry", "tangerine", "balloon", "tomato", "star",
)  # fmt: skip
STYLES = ("noto", "twemoji")
FIDELITY_STEPS = 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure; ``size`` is height and width in pixels, None the engines' default."""

    engines: tuple[str, ...] = ()
    base: str = "emoji"
    only: str | None = None
    batches: tuple[int, ...] = (1, 4, 8)
    steps: int = 10
    rounds: int = 12
    guidance: float = 3.0
    provider: str = "auto"
    size: Size | None = None
    schedule: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that will run."""
        return PARTS if self.only is None else (self.only,)


def check(plan: Plan) -> None:
    """Raise ``InputError`` for values out of range, before anything is built."""
    if plan.only is not None and plan.only not in PARTS:
        raise InputError(f"--only is '{plan.only}'; known: {', '.join(PARTS)}")
    if plan.base.startswith("random:") and plan.only != "cost":
        raise InputError(f"base '{plan.base}' has no weights to run; add --only cost")
    if not STEPS[0] <= plan.steps <= STEPS[1]:
        raise InputError(f"steps is {plan.steps}; it must be between {STEPS[0]} and {STEPS[1]}")
    if not GUIDANCE[0] <= plan.guidance <= GUIDANCE[1]:
        raise InputError(f"guidance is {plan.guidance:g}; it must be between {GUIDANCE[0]:g} and {GUIDANCE[1]:g}")
    if any(not 1 <= b <= 32 for b in plan.batches):
        raise InputError(f"batch sizes are {', '.join(map(str, plan.batches))}; each must be between 1 and 32")
    if plan.size is not None and "cost" in plan.parts:
        raise InputError("cost is counted at the model's own size; with --size add --only latency or --only fidelity")
    if "cost" in plan.parts and plan.only == "cost" and importlib.util.find_spec("torch") is None:
        raise InputError("counting cost needs torch and diffusers; install with: pip install 'pnp-trt[build]'")


def wanted_engines(plan: Plan) -> tuple[str, ...]:
    """The engines to open: those named, or the base's plain and guided ones."""
    if plan.only == "cost":
        return ()
    return plan.engines or engine_names(plan.base)


def run(plan: Plan, *, command: Sequence[str], progress: Progress | None = None) -> dict[str, Any]:
    """Measure; returns the document, with the picture grid in it where fidelity ran.

    Raises:
        InputError: for unknown or damaged engines, or engines of different bases.
    """
    from . import cost, latency, results

    say = progress or (lambda text, done, total: None)
    check(plan)
    pipes = _open(wanted_engines(plan), plan.provider)
    for pipe in pipes:
        pipe.check_size(plan.size)
    plan = replace(plan, schedule=_common_schedule(pipes, plan.schedule))
    rows: dict[str, Any] = {}
    if "cost" in plan.parts and importlib.util.find_spec("torch") is not None:
        say("counting cost", 0, 1)
        from .networks import networks

        rows["cost"] = cost.cost_rows(networks(plan.base))
        rows["methods_cost"] = cost.method_rows(rows["cost"], steps=plan.steps)
    if "latency" in plan.parts:
        cases = [latency.Case(pipe, method) for pipe in pipes for method in pipe.methods]
        rows["latency"] = latency.measure(
            cases, batches=plan.batches, steps=plan.steps, rounds=plan.rounds, guidance=plan.guidance,
            prompts=[f"{p}, {STYLES[0]} style" for p in PROMPTS], schedule=plan.schedule, size=plan.size,
            progress=lambda done, total, what: say("timing", done, total),
        )  # fmt: skip
    if "fidelity" in plan.parts:
        rows["fidelity"], rows["pictures"] = _fidelity(pipes, plan, say)
    return results.document(["pnp-trt", *command], settings=asdict(plan), task_quality_evaluated=False, **rows)


def _common_schedule(pipes: Sequence[Pipeline], wanted: str | None) -> str | None:
    """One schedule for all, so that methods alone differ: the wanted one, what the engines agree on, or DDIM."""
    found = {pipe.schedule(1, wanted).name for pipe in pipes}
    return found.pop() if len(found) == 1 else "ddim" if found else None


def _open(names: Sequence[str], provider: str) -> list[Pipeline]:
    bases: dict[str, list[str]] = {}
    for name in names:
        manifest = read_manifest(find_bundle(name))
        bases.setdefault(manifest["base"]["sha256"]["all"], []).append(name)
    if len(bases) > 1:
        groups = " and ".join(", ".join(group) for group in bases.values())
        raise InputError(
            f"these engines have different base models and cannot be compared: {groups}; bench each base alone"
        )
    return [Pipeline.load(name, provider=provider) for name in names]


def _fidelity(pipes: list[Pipeline], plan: Plan, say: Progress) -> tuple[list[dict[str, Any]], Any]:
    """Distance of every method's pictures to the teacher's CFG pictures of the same seeds."""
    prompts = [f"{p}, {style} style" for style in STYLES for p in PROMPTS]
    seeds = list(range(len(prompts)))
    cases = [(pipe, method) for pipe in pipes for method in pipe.methods]
    cases.sort(key=lambda c: ("cfg", "guided", "unguided").index(c[1]))
    made: list[tuple[str, str, np.ndarray]] = []
    for i, (pipe, method) in enumerate(cases):
        say(f"drawing {method}", i, len(cases))
        pictures = pipe(prompts, steps=FIDELITY_STEPS, guidance=plan.guidance, seed=seeds, method=method,
                        schedule=plan.schedule, size=plan.size)  # fmt: skip
        made.append((pipe.name, method, np.stack([p.pixels for p in pictures])))
    if not made or made[0][1] != "cfg":
        return [], None
    from . import fidelity, results

    teacher = made[0][2]
    features = _features([pixels for _, _, pixels in made])
    rows = []
    for i, (engine, method, pixels) in enumerate(made):
        if i == 0:
            continue
        row: dict[str, Any] = {
            "engine": engine, "method": method, "steps": FIDELITY_STEPS, "guidance": plan.guidance,
            "pictures": len(pixels), "psnr_to_cfg_db": _mean(fidelity.psnr(pixels, teacher)),
        }  # fmt: skip
        if features is not None:
            row["feature_cosine_to_cfg"] = _mean(fidelity.cosine(features[i], features[0]))
        rows.append(row)
    w = f"w = {plan.guidance:g}"
    labels = {
        "cfg": f"teacher, CFG\n2 passes, {w}",
        "guided": f"guided\n1 pass, {w}",
        "unguided": "no guidance\n1 pass",
    }
    shown = len(PROMPTS) // 2
    grid = results.encode_pictures(
        {"label": labels[method], "engine": engine, "method": method, "steps": FIDELITY_STEPS,
         "guidance": plan.guidance, "pixels": pixels[:shown]}
        for engine, method, pixels in made
    )  # fmt: skip
    caption = f"{STYLES[0]} style, {FIDELITY_STEPS} steps"
    return rows, {"columns": list(PROMPTS[:shown]), "rows": grid, "caption": caption}


def _mean(values: np.ndarray) -> dict[str, Any]:
    """Mean over pictures with a 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), size=(2000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "count": len(values)}


def _features(pictures: list[np.ndarray]) -> list[np.ndarray] | None:
    """EfficientNet features of each set, or None where the package is not installed."""
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return None
    from .fidelity import FeatureExtractor

    extractor = FeatureExtractor()
    return [extractor(p) for p in pictures]


def write_grid(document: dict[str, Any], path: Path) -> None:
    """The document's pictures as one PNG; an existing file is replaced only once the new one is whole."""
    from PIL import Image

    from ..runtime.images import grid as draw
    from .results import decode_pictures

    pictures = document["pictures"]
    pixels = draw(
        [(label, list(stack)) for label, stack in decode_pictures(pictures)],
        pictures["columns"],
        f"{pictures['caption']}, the same seed down each column",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(beside, format="PNG")
    beside.replace(path)

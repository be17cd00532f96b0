"""`pnp-trt calibrate`: observe layers, sweep, decide, and write the record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...bundle.store import digest, lock, write_text
from ...errors import InputError
from ...io.files import check_writable_file, remove_temporaries_of
from ...io.inputs import check_seed
from ...io.progress import Progress
from ...io.replacing import check_removable_file
from ...models.bases import resolve
from ...models.conditioning import encode_prompts
from ...models.prompts import read_prompts, warn_of_long_prompts
from ...models.student import Student, Teacher
from ...version import __version__, installed
from .observe import Loop, Observer, candidates
from .record import ObservedLayer, Record, default_path
from .sweep import Probes, Sweep, latent_error

#: Parts of the names of layers that stay in floating point without a sweep.  Their inputs are not normalised: they are
#: the residual stream, or its concatenation with a skip connection of very different scale.  With SD 1.5's architecture
#: and random weights, the 14 shortcuts alone cause an error of the prediction of 89 % and the six samplers 60 %, all
#: linear layers together 3 %.
UNEVEN = ("conv_shortcut", "samplers.")
PROMPTS = Path("calibration/emoji-prompts.txt")
#: seeds of runs that are not used for observation
PROBE, CHECK = 1_000_001, (1_000_002, 1_000_003)


@dataclass(frozen=True)
class CalibrationConfig:
    """What to observe, and the error limit of the result.

    Attributes:
        base, guide: as in ``BuildSpec``; guide ``none`` observes classifier-free guidance.
        prompts: text file with one prompt per line.
        out: path of the record; None takes ``record.default_path``.
        images: number of images to sample while observing.
        batch: batch size.
        steps: steps per run; None takes the number for which the guide was distilled, or 20.
        w_min, w_max: range of the guidance scale, sampled for each image.
        layers: patterns (``fnmatch``) of the layers that may use INT8; None takes those of the U-Net, and of a full
            guide.
        probes: number of states on which the sweep measures, in batches of 4; 0 skips the sweep and leaves the layers
            whose inputs are not normalised (``UNEVEN``) in floating point.
        limit: largest error of the prediction; it determines how many layers stay in floating point.
        seed: seed of all randomness.
    """

    base: str = "emoji"
    guide: str = "auto"
    prompts: Path = PROMPTS
    out: Path | None = None
    images: int = 64
    batch: int = 8
    steps: int | None = None
    w_min: float = 1.0
    w_max: float = 9.0
    layers: tuple[str, ...] | None = None
    probes: int = 10
    limit: float = 0.02
    seed: int = 0

    def check(self) -> None:
        """Raise ``InputError`` for a value out of range."""
        for name, least in (("images", 1), ("batch", 1), ("probes", 0), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        check_seed(self.seed)
        if not 1.0 <= self.w_min <= self.w_max < math.inf:
            raise InputError(
                f"the guidance scales are {self.w_min:g} to {self.w_max:g}; give 1 or more, smallest first"
            )
        if not self.limit > 0:
            raise InputError(f"the limit is {self.limit:g}; it must be above 0")


def calibrate(
    config: CalibrationConfig, *, force: bool = False, progress: Progress | None = None
) -> tuple[Path, Record]:
    """Observe, sweep and write a record; an interrupted run resumes where it stopped.

    Args:
        force: replace an existing record; its results are reused if they are from the same run.

    Returns:
        The path of the record, and the record.

    Raises:
        InputError: for a value out of range, an existing record, or a base or guide that does not load.
        PnpError: if a prediction is not finite.
    """
    config.check()
    out = config.out or default_path(config.base, _guide_name(config))
    _check_out(out, force)
    report = progress or (lambda *_: None)
    report("load", 0, 1, "")
    loop, identity = _loop(config)
    partial = out.with_name(f".{out.name}.partial")
    with lock(out):
        key = digest([identity, {k: v for k, v in asdict(config).items() if k not in ("out", "prompts", "limit")}])
        modules = candidates(loop.network, config.layers or _default_layers(loop.network))
        remove_temporaries_of(partial)
        results = _continued(partial, key) or _reusable(out, identity, set(modules))
        if "layers" not in results:
            results["layers"] = {n: asdict(layer) for n, layer in _observe(config, loop, modules, report).items()}
        record = Record(
            **identity,
            layers={n: ObservedLayer(**layer) for n, layer in results["layers"].items()},
            versions={"pnp-trt": __version__, **installed(("torch", "nvidia-modelopt", "diffusers"))},
        )
        _keep(partial, key, results)
        sweep = results.setdefault("sweep", {})
        _decide(config, loop, modules, record, sweep, lambda: _keep(partial, key, results), report)
        record.write(out)
        partial.unlink(missing_ok=True)
    return out, record


def _check_out(out: Path, force: bool) -> None:
    """Refuse a record that cannot be written, or a file that may not be replaced."""
    check_writable_file(out)
    if out.exists() and not force:
        raise InputError(f"{out} exists already; pass --force to replace it, or choose another --out")
    check_removable_file(out, "pnp-trt/calibration/", "--out", "a calibration record")


def _loop(config: CalibrationConfig) -> tuple[Loop, dict[str, Any]]:
    from ...models.guides.load import load_guide
    from ...models.identity import guide_identity

    base = resolve(config.base)
    prompts = read_prompts(config.prompts)
    warn_of_long_prompts(base.tokenizer(), prompts)
    name = _guide_name(config)
    guide_of = guide_identity(config.base, config.guide)
    unet = base.unet().float()
    network: Any
    if config.guide == "none":
        network = Teacher(unet)
    else:
        network = Student(unet, (base.make_guide(config.guide, unet) or load_guide(name)).float())
    fixed = None if guide_of is None else guide_of.get("sampling_steps")
    chosen = [prompts[i] for i in _spread(len(prompts), 4 * config.images)]
    loop = Loop(
        network.eval().requires_grad_(False), base.scheduler_config(),
        encode_prompts(base, chosen, torch.device("cpu")), base.sizes().latent,
        (config.w_min, config.w_max), config.steps or fixed or 20, exact=fixed is not None,
    )  # fmt: skip
    if not 1 <= loop.steps <= (n := loop.scheduler.get("num_train_timesteps", 1000)):
        raise InputError(f"steps is {loop.steps}; it must be between 1 and {n}")
    settings = {
        "prompts": {"file": config.prompts.name, "lines": len(prompts), "used": len(chosen), "sha256": digest(prompts)},
        "images": config.images, "batch": config.batch, "steps": loop.steps, "w": [config.w_min, config.w_max],
        "probes": config.probes, "seed": config.seed,
        "sampler": "DDIM" if loop.exact else "DDIM, each run shifted by a random part of a step",
    }  # fmt: skip
    return loop, {
        "base": {"name": config.base, "sha256": base.fingerprint()["all"]}, "guide": guide_of, "settings": settings,
    }  # fmt: skip


def _observe(
    config: CalibrationConfig, loop: Loop, modules: dict[str, Any], report: Progress
) -> dict[str, ObservedLayer]:
    observer = Observer(modules, loop.scheduler.get("num_train_timesteps", 1000))
    runs = -(-config.images // config.batch)
    with observer.watching(histogram=False):  # to find the range of the histograms
        report("observe", 0, runs * loop.steps, "largest values")
        loop.run(config.seed, 1, observer.at)
    evaluations = 0

    def at(x: Any, t: int, *_: Any) -> None:
        nonlocal evaluations
        observer.at(x, t)
        report("observe", evaluations, runs * loop.steps, f"timestep {t}")
        evaluations += 1

    with observer.watching(histogram=True):
        for run in range(runs):
            loop.run(config.seed + 1 + run, min(config.batch, config.images - run * config.batch), at)
    return observer.result()


def _decide(
    config: CalibrationConfig, loop: Loop, modules: dict[str, Any], record: Record, figures: dict[str, Any],
    save: Callable[[], None], report: Progress,
) -> None:  # fmt: skip
    kinds = {layer.kind for layer in record.layers.values()}
    if not config.probes:
        record.sweep = {"left out": "no probes were requested"}
        uneven = [name for name in record.layers if any(part in name for part in UNEVEN)]
        record.decision = {**dict.fromkeys(sorted(kinds), "percentile-99.999"), "float": uneven}
        return
    report("probes", 0, 1, "")
    probes = Probes.collect(loop, PROBE, 4, config.probes)
    sweep = Sweep(loop, probes, modules, record.layers, figures, save, report)
    best = sweep.methods()
    order = sweep.each(best)
    float_layers = sweep.float_layers(best, order, config.limit)
    record.decision = {**best, "float": float_layers}
    report("whole loop", 0, 1, "")
    figures["states"] = sum(len(x) for x, *_ in probes.states)
    figures["limit"] = config.limit
    figures["latent_error"] = float(f"{latent_error(loop, modules, record.choices(), CHECK):.4g}")
    record.sweep = figures


def _default_layers(network: Any) -> tuple[str, ...]:
    guide = network.guide.quantised_layers if isinstance(network, Student) else ()
    return ("unet.*", *(f"guide.{pattern}" for pattern in guide))


def _guide_name(config: CalibrationConfig) -> str:
    return "emoji-tiny" if config.guide == "auto" else "teacher" if config.guide == "none" else config.guide


def _spread(count: int, most: int) -> list[int]:
    """Return the indices of at most ``most`` of ``count`` lines, evenly spaced over the file."""
    return sorted({i * count // min(count, most) for i in range(min(count, most))})


def _continued(partial: Path, key: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(partial.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document["found"] if isinstance(document, dict) and document.get("key") == key else {}


def _reusable(out: Path, identity: dict[str, Any], layers: set[str]) -> dict[str, Any]:
    """Return the results of an existing record of the same run, so that another limit needs no new measurements."""
    try:
        record = Record.read(out)
    except InputError:
        return {}
    same = all(getattr(record, k) == v for k, v in identity.items()) and set(record.layers) == layers
    if not same or "methods" not in record.sweep:
        return {}
    return {"layers": {n: asdict(layer) for n, layer in record.layers.items()}, "sweep": record.sweep}


def _keep(partial: Path, key: str, results: dict[str, Any]) -> None:
    write_text(json.dumps({"key": key, "found": results}), partial)

"""Gain: factors g(t) of a guide's residuals, so that its change of the prediction is as long as the teacher's.

Least squares learns the conditional mean of the guidance, which has the right direction but is too short.  A table in
the guide's config multiplies the residuals (``models.guides.parts.GainTable``).  It costs nothing at inference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.runs import claim
from ..bundle.store import digest, sha256, write_json
from ..errors import InputError, PnpError
from ..io.files import check_writable_folder
from ..io.progress import Progress
from ..models.catalog import guide_folder
from ..models.guides import Guide
from ..models.guides.load import load_guide
from ..models.guides.parts import LAST_TIMESTEP, MAX_GAINS
from ..models.student import Student
from .monitor import predict_states, target_of
from .run import TeacherModel, guide_weights, origin, origin_record, report_head, save_guide
from .states import Collection, StateConfig, States

#: guidance scales at which lengths are compared; the states take them in turn
SCALES = (2.0, 3.0, 5.0, 8.0)
#: rounds of the fit; one is not enough, because the decoder is not linear in the residuals
ROUNDS = 4


@dataclass(frozen=True)
class GainConfig:
    """Settings of a gain fit.

    Attributes:
        guide: folder or name of a stage 1 guide; a gain that it already has is replaced.
        out: folder of the new guide.
        values: number of values in the table; 1 fits a constant factor.
        factor: a constant factor to use instead of a fit; None fits the table.
        base, prompts: None takes those that the guide was distilled with.
        states: number of states, from the teacher's CFG trajectories, to compare lengths on.
        seed: seed of the states; use another than the guide's training, so that the states are held out.
    """

    guide: str
    out: Path
    values: int = 9
    factor: float | None = None
    base: str | None = None
    prompts: Path | None = None
    states: int = 640
    seed: int = 1

    def check(self) -> None:
        """Raise ``InputError`` for values out of range."""
        if not 1 <= self.values <= MAX_GAINS:
            raise InputError(f"values is {self.values}; it must be between 1 and {MAX_GAINS}")
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0):
            raise InputError(f"factor is {self.factor:g}; it must be above 0")
        self.collection().check()

    def collection(self) -> StateConfig:
        """Settings of the states to collect."""
        return StateConfig("trajectory", self.states, batch=min(32, -(-self.states // 20)), seed=self.seed)


def fit(config: GainConfig, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Write a copy of a guide with a gain, and its report ``distill.json``, to ``config.out``.

    Args:
        resume: continue the run in ``config.out``.
        progress: called with (stage, done, total, note).

    Returns:
        The report.

    Raises:
        InputError: for a guide of stage 2 or of a class without ``gain``, unreadable prompts, or an ``out`` that holds
            another run.
        PnpError: if no state is near one of the table's timesteps, or the guide changes nothing there.
    """
    config.check()
    check_writable_folder(config.out)
    notify = progress or (lambda *_: None)
    started = time.monotonic()
    folder = guide_folder(config.guide)
    guide = load_guide(str(folder))
    if guide.sampling_steps is not None:
        raise InputError(
            f"{folder} was distilled for {guide.sampling_steps} steps, whose targets are not the teacher's; fit the "
            "gain of the stage 1 guide, and run pnp-trt distill steps on the result"
        )
    guide.use_gain(None)  # raises early for a class without gain
    base, prompts, prompts_file = origin(folder, config.base, config.prompts)
    teacher = TeacherModel.load(base, prompts, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    source = {"name": folder.name, "weights": sha256(guide_weights(folder)), "distilled": origin_record(folder)}
    settings = {k: v for k, v in asdict(config).items() if k != "out"}
    settings |= {"base": base, "prompts": prompts_file}
    identity = {"teacher": teacher.hashes, "prompts": digest(prompts)}
    claim(config.out, settings | identity | {"weights": source["weights"]}, resume)
    collection = Collection(
        teacher.unet, teacher.scheduler, teacher.conditions, config.collection(), config.out / "states", identity
    )
    collection.make(range(config.collection().shards), lambda done, total, note: notify("states", done, total, note))
    states = collection.read()
    student = Student(teacher.unet, guide.to(teacher.device))

    def measure_lengths() -> list[float]:
        return lengths(student, states, config.values)

    if config.factor is None:
        rounds = fit_table(guide, measure_lengths, config.values, notify)
    else:
        rounds = [measure_lengths()]
        guide.use_gain([config.factor])
        rounds.append(measure_lengths())
    guide.to("cpu")
    save_guide(guide, config.out)
    report = {
        "schema": "pnp-trt/distill/2",
        "stage": "gain",
        **report_head(teacher, guide, settings, time.monotonic() - started),
        "identity": identity,
        "states": len(states),
        "gain": list(guide.config.gain),
        # length of the guide's change over that of the teacher's, at these timesteps
        "length": {"timestep": nodes(config.values), "before": rounds[0], "after": rounds[-1]},
        "of": source,
    }
    write_json(config.out / "distill.json", report)
    return report


def fit_table(
    guide: Guide, measured: Callable[[], list[float]], count: int, say: Progress = lambda *_: None
) -> list[list[float]]:
    """Give ``guide`` the table of ``count`` values with which its change is as long as the teacher's.

    Args:
        measured: returns the length of the guide's present change over that of the teacher's, near each timestep of the
            table.

    Returns:
        The lengths without a gain and after each round.

    Raises:
        PnpError: if no state is near one of the timesteps, or the guide changes nothing there.
    """
    guide.use_gain(None)
    rounds, gain = [measured()], [1.0] * count
    for number in range(1, ROUNDS + 1):
        for t, length in zip(nodes(count), rounds[-1], strict=True):
            if not (math.isfinite(length) and length > 0):
                raise PnpError(
                    f"near timestep {t:.0f} there is no state, or the guide adds nothing that a gain could scale; "
                    "use more states or fewer values, or distil the guide first"
                )
        gain = [round(g / length, 4) for g, length in zip(gain, rounds[-1], strict=True)]
        guide.use_gain(gain)
        rounds.append(measured())
        say("gain", number, ROUNDS, f"length {min(rounds[-1]):.2f} to {max(rounds[-1]):.2f} of the teacher's")
    return rounds


def nodes(count: int) -> list[float]:
    """Timesteps of a table's values; a single value is in the middle."""
    return [LAST_TIMESTEP / 2] if count == 1 else [LAST_TIMESTEP * i / (count - 1) for i in range(count)]


@torch.no_grad()
def lengths(student: Student, states: States, count: int) -> list[float]:
    """Length of the guide's change of the prediction over that of the teacher's, near each of ``count`` timesteps.

    Both are changes of the conditional prediction, divided by w − 1.
    """
    device = next(student.guide.parameters()).device
    scales = torch.tensor(SCALES)
    sums = torch.zeros(2, count, dtype=torch.float64)
    for pick in torch.arange(len(states)).split(64):
        w = scales[pick % len(scales)].to(device)
        target, conditional = target_of(states, pick, w)
        strength = (w - 1)[:, None, None, None]
        predicted = (predict_states(student, states, pick, w) - conditional) / strength
        true = (target - conditional) / strength
        sums += length_sums(predicted, true, states.timestep[pick], count)
    return (sums[0] / sums[1]).sqrt().tolist()


def length_sums(predicted: Tensor, true: Tensor, timestep: Tensor, count: int) -> Tensor:
    """Sums of squares of both changes ``[N, …]`` near each of ``count`` timesteps, ``[2, count]``, on the CPU.

    A state is shared between its two neighbouring timesteps by distance, as in the table's interpolation.
    """
    squares = torch.stack([change.double().square().flatten(1).sum(1) for change in (predicted, true)])
    return squares.cpu() @ _shares(timestep.cpu(), count)


def _shares(timestep: Tensor, count: int) -> Tensor:
    """Share of each state in each of the table's values, ``[N, count]``; rows sum to one."""
    if count == 1:
        return torch.ones(len(timestep), 1, dtype=torch.float64)
    position = timestep.double()[:, None] * ((count - 1) / LAST_TIMESTEP)
    return (1 - (position - torch.arange(count)).abs()).clamp(min=0)

"""Gain: factors g(t) of a guide's residuals, so that its change of the prediction is as long as the teacher's.

Least squares gives the conditional mean of the guidance, which is right in direction and too short.  A table in the
guide's config multiplies the residuals (``models.guides.parts.GainTable``); it costs nothing at inference.
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

#: guidance scales at which lengths are compared, in turn over the states
SCALES = (2.0, 3.0, 5.0, 8.0)
#: rounds of the fit; the decoder is not linear in the residuals, so that one is not enough
ROUNDS = 4


@dataclass(frozen=True)
class GainConfig:
    """A fit of a guide's gain.

    Attributes:
        guide: folder or name of a stage 1 guide; a gain that it has is replaced.
        out: folder of the new guide.
        values: number of values of the table; 1 fits a constant factor.
        factor: a constant factor that is taken as it is; None fits the table.
        base, prompts: None takes those that the guide was distilled with.
        states: states to compare lengths on, on the teacher's CFG trajectories.
        seed: of the states; another than that of the guide's training holds them out.
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
        """How the states are made."""
        return StateConfig("trajectory", self.states, batch=min(32, -(-self.states // 20)), seed=self.seed)


def fit(config: GainConfig, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Write a copy of a guide with a gain, and its report ``distill.json``, to ``config.out``.

    Args:
        resume: continue the run that ``config.out`` holds.
        progress: called with (stage, done, in all, note).

    Returns:
        The report.

    Raises:
        InputError: for a guide of stage 2 or of a class without ``gain``, unreadable prompts, or an ``out`` that holds
            another run.
        PnpError: if the states leave a part of the table out, or the guide changes nothing there.
    """
    config.check()
    check_writable_folder(config.out)
    say = progress or (lambda *_: None)
    started = time.monotonic()
    folder = guide_folder(config.guide)
    guide = load_guide(str(folder))
    if guide.sampling_steps is not None:
        raise InputError(
            f"{folder} was distilled for {guide.sampling_steps} steps, whose targets are not the teacher's; fit the "
            "gain of the stage 1 guide, and run pnp-trt distill steps on the result"
        )
    guide.use_gain(None)  # refuses a class without gain before anything is made
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
    collection.make(range(config.collection().shards), lambda done, total, note: say("states", done, total, note))
    states = collection.read()
    student = Student(teacher.unet, guide.to(teacher.device))

    def measured() -> list[float]:
        return lengths(student, states, config.values)

    if config.factor is None:
        found = fit_table(guide, measured, config.values, say)
    else:
        found = [measured()]
        guide.use_gain([config.factor])
        found.append(measured())
    guide.to("cpu")
    save_guide(guide, config.out)
    report = {
        "schema": "pnp-trt/distill/2",
        "stage": "gain",
        **report_head(teacher, guide, settings, time.monotonic() - started),
        "identity": identity,
        "states": len(states),
        "gain": list(guide.config.gain),
        # of the guide's change over the teacher's, at the timesteps
        "length": {"timestep": nodes(config.values), "before": found[0], "after": found[-1]},
        "of": source,
    }
    write_json(config.out / "distill.json", report)
    return report


def fit_table(
    guide: Guide, measured: Callable[[], list[float]], count: int, say: Progress = lambda *_: None
) -> list[list[float]]:
    """Give ``guide`` the table of ``count`` values with which its change is as long as the teacher's.

    Args:
        measured: lengths of the guide's change, as it is, over the teacher's near the timesteps of the table.

    Returns:
        The lengths without a gain, and after each of the rounds.

    Raises:
        PnpError: if there is no state near one of the timesteps, or the guide changes nothing there.
    """
    guide.use_gain(None)
    found, gain = [measured()], [1.0] * count
    for number in range(1, ROUNDS + 1):
        for t, length in zip(nodes(count), found[-1], strict=True):
            if not (math.isfinite(length) and length > 0):
                raise PnpError(
                    f"near timestep {t:.0f} there is no state, or the guide adds nothing, which no gain can change; "
                    "take more states or fewer values, or distil the guide first"
                )
        gain = [round(g / length, 4) for g, length in zip(gain, found[-1], strict=True)]
        guide.use_gain(gain)
        found.append(measured())
        say("gain", number, ROUNDS, f"length {min(found[-1]):.2f} to {max(found[-1]):.2f} of the teacher's")
    return found


def nodes(count: int) -> list[float]:
    """Timesteps of a table's values; that of a single one is in the middle."""
    return [LAST_TIMESTEP / 2] if count == 1 else [LAST_TIMESTEP * i / (count - 1) for i in range(count)]


@torch.no_grad()
def lengths(student: Student, states: States, count: int) -> list[float]:
    """Length of the guide's change of the prediction over that of the teacher's, near each of ``count`` timesteps.

    Both changes are those from the conditional prediction, over w − 1.
    """
    device = next(student.guide.parameters()).device
    scales = torch.tensor(SCALES)
    sums = torch.zeros(2, count, dtype=torch.float64)
    for pick in torch.arange(len(states)).split(64):
        w = scales[pick % len(scales)].to(device)
        target, conditional = target_of(states, pick, w)
        over = (w - 1)[:, None, None, None]
        predicted = (predict_states(student, states, pick, w) - conditional) / over
        true = (target - conditional) / over
        sums += length_sums(predicted, true, states.timestep[pick], count)
    return (sums[0] / sums[1]).sqrt().tolist()


def length_sums(predicted: Tensor, true: Tensor, timestep: Tensor, count: int) -> Tensor:
    """Sums of squares of both changes ``[N, …]`` near each of ``count`` timesteps, ``[2, count]``, on the CPU.

    A state belongs to the two timesteps beside it by its distance, as in the table's interpolation.
    """
    squares = torch.stack([change.double().square().flatten(1).sum(1) for change in (predicted, true)])
    return squares.cpu() @ _shares(timestep.cpu(), count)


def _shares(timestep: Tensor, count: int) -> Tensor:
    """How far a state belongs to each of the table's values, ``[N, count]``; a row's sum is one."""
    if count == 1:
        return torch.ones(len(timestep), 1, dtype=torch.float64)
    place = timestep.double()[:, None] * ((count - 1) / LAST_TIMESTEP)
    return (1 - (place - torch.arange(count)).abs()).clamp(min=0)

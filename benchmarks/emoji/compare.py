"""Measures and verdicts of the tables: findings from numbers with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import AlignmentHead

from .measures import Shots

RECALLS = (1, 5)


@dataclass
class Ranked:
    """One cell's images, with each image's rank of its own caption, int ``[N]``."""

    shots: Shots
    ranks: np.ndarray

    @classmethod
    def of(cls, shots: Shots, concepts: Sequence[str], head: AlignmentHead) -> Ranked:
        return cls(shots, head.ranks(shots.features, concepts))


def quality(real: Shots, sets: Sequence[Ranked]) -> dict[str, Any]:
    """KID, R@1 and R@5: means over sets that differ only in their noise, intervals over captions.

    The interval of R@k is Wilson's for one set, and the bootstrap's for several.
    """
    out: dict[str, Any] = {"kid": fidelity.mean_kid(real.features, [s.shots.features for s in sets]).as_dict()}
    for k in RECALLS:
        if len(sets) == 1:
            out[f"R@{k}"] = fidelity.recall(sets[0].ranks, k).as_dict()
        else:
            out[f"R@{k}"] = fidelity.mean(np.mean([s.ranks <= k for s in sets], axis=0)).as_dict()
    return out


def distance(sets: Sequence[Ranked], teacher: Sequence[Ranked]) -> dict[str, Any]:
    """PSNR (dB) and feature cosine to the teacher's images of the same captions and noise."""
    pairs = list(zip(sets, teacher, strict=True))
    psnr = np.mean([fidelity.psnr(a.shots.pixels, b.shots.pixels) for a, b in pairs], axis=0)
    cosine = np.mean([fidelity.cosine(a.shots.features, b.shots.features) for a, b in pairs], axis=0)
    return {"psnr_db": fidelity.mean(psnr).as_dict(), "feature_cosine": fidelity.mean(cosine).as_dict()}


def nearer(sets: Sequence[Ranked], others: Sequence[Ranked], teacher: Sequence[Ranked]) -> dict[str, Any]:
    """How much nearer ``sets`` are than ``others`` to the teacher's images, in dB of PSNR, paired by image."""
    pairs = [
        fidelity.psnr(a.shots.pixels, c.shots.pixels) - fidelity.psnr(b.shots.pixels, c.shots.pixels)
        for a, b, c in zip(sets, others, teacher, strict=True)
    ]
    return {"psnr_db": fidelity.mean(np.mean(pairs, axis=0)).as_dict()}


def gain(real: Shots, before: Sequence[Ranked], after: Sequence[Ranked]) -> dict[str, Any]:
    """Gain of ``after`` over ``before``, paired by caption and noise; above 0 ``after`` is better (KID too)."""
    kid = fidelity.mean_kid_gain(real.features, [s.shots.features for s in before], [s.shots.features for s in after])
    out: dict[str, Any] = {"kid": kid.as_dict()}
    for k in RECALLS:
        each = [(b.ranks <= k).astype(float) - (a.ranks <= k) for a, b in zip(before, after, strict=True)]
        out[f"R@{k}"] = fidelity.mean(np.mean(each, axis=0)).as_dict()
    return {**out, "no_worse": no_worse(out["kid"])}


def outcome(estimate: dict[str, float]) -> str:
    """``better``, ``worse``, or ``no difference shown`` if the interval of a gain contains 0."""
    if estimate["low"] > 0:
        return "better"
    return "worse" if estimate["high"] < 0 else "no difference shown"


def no_worse(estimate: dict[str, float]) -> bool:
    """Whether the interval of a gain contains 0 or is above it."""
    return estimate["high"] >= 0


#: goals for Table A: (text, guide method, its steps, the teacher's steps)
GOALS = (
    ("tiny at 50 steps is no worse than the teacher's CFG at 50", "tiny", 50, 50),
    ("tiny at 16 steps is no worse than the teacher's CFG at 16", "tiny", 16, 16),
    ("tiny after stage 2 at 16 steps is no worse than the teacher's CFG at 16", "tiny-stage2", 16, 16),
    ("tiny after stage 2 at 8 steps is no worse than the teacher's CFG at 50", "tiny-stage2", 8, 50),
)


def goal_verdicts(groups: Sequence[dict[str, Any]], w: float) -> list[dict[str, Any]]:
    """Table A's goals at one w, on trained captions; a goal that was not measured is marked."""
    out = []
    for text, method, steps, against in GOALS:
        row = next(
            (g for g in groups if (g["table"], g["method"], g["steps"], g["w"], g["captions"])
             == ("A", method, steps, w, "train")), None,
        )  # fmt: skip
        gains = None if row is None else row["gain_over_cfg"].get(str(against))
        if row is None or gains is None:
            out.append({"goal": text, "w": w, "measured": False})
            continue
        out.append({
            "goal": text, "w": w, "measured": True, "seeds": len(row["seeds"]), "gain": gains,
            "reached": no_worse(gains["kid"]), "kid": outcome(gains["kid"]), "R@1": outcome(gains["R@1"]),
        })  # fmt: skip
    return out


def transfer_verdicts(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Table B: each plugged-in guide against the fine-tune's own CFG at the same steps, and against no guidance."""
    out = []
    for row in groups:
        if row["table"] != "B" or row["guide"] is None:
            continue
        verdict: dict[str, Any] = {k: row[k] for k in ("base", "method", "steps", "w")}
        for name, gains in (
            ("against_cfg", row["gain_over_cfg"].get(str(row["steps"]))), ("against_none", row["gain_over_none"]),
        ):  # fmt: skip
            verdict[name] = gains and {"gain": gains, "no_worse": no_worse(gains["kid"]), "kid": outcome(gains["kid"]),
                                   "R@1": outcome(gains["R@1"])}  # fmt: skip
        out.append(verdict)
    return out


def free_verdict(guide: dict[str, Any], rival: dict[str, Any], guide_gains: dict[str, Any]) -> dict[str, Any]:
    """One comparison of Table C: the winner by KID and by R@1, and whether the rival takes no more evaluations.

    ``guide_gains`` is the guide's paired gain over the rival.
    """
    won = {"better": "guide", "worse": "rival", "no difference shown": None}
    return {
        "w": guide["w"],
        "guide": {k: guide[k] for k in ("method", "steps", "evaluations")},
        "rival": {k: rival[k] for k in ("method", "steps", "evaluations", "interval")},
        "rival_costs_no_more": rival["evaluations"] <= guide["evaluations"],
        "gain": guide_gains,
        "wins": {name: won[outcome(guide_gains[name])] for name in ("kid", "R@1")},
    }

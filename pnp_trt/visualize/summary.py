"""Check from a recording whether the paper's description of the feature maps holds for a guide.

*Plug-and-Play Diffusion Distillation* (Hsiao et al., CVPR 2024) describes its guide's feature maps: strong injection in
the early, noisy steps; later mostly high-frequency detail of low strength; and stronger injection for larger w.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .record import Recording

#: a map is mostly detail if its high-frequency share of energy exceeds this
MOSTLY = 0.5


def summarise(recording: Recording) -> dict[str, Any]:
    """Return the numbers behind the paper's claims, and whether each holds; None if this run cannot decide.

    Strength is the mean over the layers that the guide adds to, at the scales above 1 (at w = 1 it is zero).
    Early means the first third of the steps, late the last third.
    """
    w = np.array(recording.guidance)
    strength = recording.relative[:, recording.emitting]  # [W, L, S]
    guided = [i for i in range(len(w)) if w[i] > 1]
    nothing = not guided or not strength[guided].any()
    out: dict[str, Any] = {
        "mean_strength": {f"{a:g}": float(s.mean()) for a, s in zip(w, strength, strict=True)},
        "strongest": None, "early_to_late": None, "high_frequency": None, "growth": None, "holds": None,
    }  # fmt: skip
    if nothing:
        return out
    over_steps = strength[guided].mean((0, 1))
    peak = int(over_steps.argmax())
    out["strongest"] = {
        "step": peak + 1, "timestep": recording.timesteps[peak], "strength": float(over_steps[peak]),
    }  # fmt: skip
    claims: dict[str, bool] = {}
    steps = len(recording.timesteps)
    third = -(-steps // 3)
    if steps > 1:
        by_layer = strength[guided].mean(0)
        early, late = by_layer[:, :third].mean(1), by_layer[:, -third:].mean(1)
        ratio = float(early.mean() / late.mean()) if late.mean() > 0 else None
        out["early_to_late"] = {
            "ratio": ratio, "layers_stronger_early": int((early > late).sum()), "layers": len(early),
        }  # fmt: skip
        claims["stronger_early"] = bool(early.mean() > late.mean())
        high = recording.high[guided][:, recording.emitting]
        parts = [part[~np.isnan(part)] for part in (high[:, :, :third], high[:, :, -third:])]
        if all(len(part) for part in parts):  # both thirds have some energy
            first, last = (float(part.mean()) for part in parts)
            out["high_frequency"] = {"early": first, "late": last}
            claims["more_detail_later"] = last > first
            claims["mostly_detail_later"] = last > MOSTLY
    if len(guided) > 1:
        low, top = guided[0], guided[-1]
        means = strength[guided].mean((1, 2))
        out["growth"] = {
            "from_w": float(w[low]), "to_w": float(w[top]),
            "ratio": float(means[-1] / means[0]) if means[0] > 0 else None,
            "ratio_of_w_minus_1": float((w[top] - 1) / (w[low] - 1)),
        }  # fmt: skip
        claims["grows_with_w"] = bool((np.diff(means) > 0).all())
    out["holds"] = claims
    return out


def describe(summary: dict[str, Any], what: str) -> str:
    """Describe a summary in one paragraph; ``what`` names the guide and the run."""
    strongest = summary["strongest"]
    if strongest is None:
        return f"{what}: nothing is injected anywhere; either only w = 1 was requested, or the guide is untrained."
    parts = [
        f"{what}: the injection is strongest at timestep {strongest['timestep']} (step {strongest['step']}), "
        f"on average {strongest['strength']:.1%} of the features it is added to."
    ]
    growth, early, high = summary["growth"], summary["early_to_late"], summary["high_frequency"]
    if growth is not None:
        times = "from nothing" if growth["ratio"] is None else f"{growth['ratio']:.1f}-fold"
        parts.append(
            f"From w = {growth['from_w']:g} to {growth['to_w']:g} it grows {times} "
            f"(w - 1 grows {growth['ratio_of_w_minus_1']:.1f}-fold)."
        )
    if early is not None:
        times = (
            "all of the strength" if early["ratio"] is None else f"{early['ratio']:.2f} times the last third's strength"
        )
        parts.append(
            f"The first third of the steps has {times} ({early['layers_stronger_early']} of {early['layers']} layers "
            "are stronger early)."
        )
    if high is not None:
        parts.append(
            f"The share of energy above half the Nyquist frequency changes from {high['early']:.0%} there to "
            f"{high['late']:.0%} in the last third."
        )
    parts.append(_verdict(summary["holds"]))
    return " ".join(parts)


_CLAIMS = {
    "stronger_early": "stronger in the first third of the steps",
    "more_detail_later": "more detail later",
    "mostly_detail_later": "mostly detail later",
    "grows_with_w": "stronger with larger w",
}


def _verdict(holds: dict[str, bool]) -> str:
    yes = [text for name, text in _CLAIMS.items() if holds.get(name) is True]
    no = [text for name, text in _CLAIMS.items() if holds.get(name) is False]
    open_ones = [text for name, text in _CLAIMS.items() if name not in holds]
    word = "does not hold" if not yes else "holds in full" if not no and not open_ones else "holds in part"
    lists = [("true here", yes), ("not true here", no), ("undecided in this run", open_ones)]
    details = "; ".join(f"{name}: {', '.join(words)}" for name, words in lists if words)
    return f"The paper's description {word} ({details})."

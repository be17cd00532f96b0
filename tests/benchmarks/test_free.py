"""Training-free guidance: each rule against its formula, step by step, and its rows at equal numbers of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks.emoji import free_report  # noqa: E402  (needs torch)
from benchmarks.emoji.cells import BUDGETS, INTERVAL_STEPS, METHODS, Cell, all_cells, at_budget, rule  # noqa: E402
from benchmarks.emoji.free import RULES, evaluations, most_steps  # noqa: E402
from benchmarks.emoji.sampler import Guidance, denoise  # noqa: E402
from pnp_trt.assets import ROOT as ASSETS  # noqa: E402
from pnp_trt.errors import InputError  # noqa: E402
from pnp_trt.sampling.schedules import ddim  # noqa: E402

W, STEPS = 3.5, 7
CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "timestep_spacing": "trailing"}  # fmt: skip


class Fake:
    """A cheap network, nonlinear in x, with a guide: a term in w − 1 that differs from CFG's."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Any, t: Any, text: Any, w: Any) -> Any:
        self.rows += len(x)
        level, guide = text.mean((1, 2))[:, None, None, None], (w - 1)[:, None, None, None]
        return torch.sin(x + level) + t[:, None, None, None] / 1000 + 0.2 * guide * torch.cos(x)


def e(x: np.ndarray, t: int, level: float, guide: float = 0.0) -> np.ndarray:
    return np.sin(x + level) + t / 1000 + 0.2 * guide * np.cos(x)


def by_hand(kind: str, every: int, noise: np.ndarray, level: float, empty: float) -> np.ndarray:
    """DDIM with each rule written out, in float64."""
    betas = np.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000) ** 2  # type: ignore[operator]
    abar = np.cumprod(1 - betas)
    x, stored = noise, np.zeros_like(noise)
    times = [round(1000 - 1000 / STEPS * i) - 1 for i in range(STEPS)]
    for i, t in enumerate(times):
        a = abar[t]
        c, u = e(x, t, level), e(x, t, empty)
        if kind == "cached":
            stored = c - u if i in range(0, STEPS, every) else stored
            out = u * 0 + c + (W - 1) * stored
        elif kind == "residual":
            if i == 0:
                stored = (x - np.sqrt(1 - a) * u) / np.sqrt(a)
            virtual = (x - np.sqrt(a) * stored) / np.sqrt(1 - a)
            out = virtual + W * (c - virtual)
        elif kind == "anchors":
            g = e(x, t, level, W - 1)
            if i % every == 0:
                stored = u + W * (c - u) - g
            out = g + stored * (every - i % every) / every
        else:
            shares = np.array([1, 3, 5, 7, 9, 11, 13]) / 7
            scale = 1 + (W - 1) * (shares if kind == "rising" else shares[::-1])[i]
            out = u + scale * (c - u)
        after = abar[t - 1000 // STEPS] if t >= 1000 // STEPS else abar[0]
        x = np.sqrt(after) * (x - np.sqrt(1 - a) * out) / np.sqrt(a) + np.sqrt(1 - after) * out
    return x


@pytest.mark.parametrize(("kind", "every"), [("cached", 1), ("cached", 3), ("residual", None), ("anchors", 1),
                                             ("anchors", 3), ("rising", None), ("falling", None)])  # fmt: skip
def test_a_rule_equals_its_formula(kind: str, every: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    noise, text, empty = torch.randn(2, 4, 3, 3, generator=g), torch.full((2, 5, 6), 0.7), torch.full((1, 5, 6), -0.4)
    schedule, guidance, fake, ticks = ddim(CONFIG, STEPS), Guidance(kind, W, every=every), Fake(), []
    latents = denoise(fake, schedule, noise, text, empty, guidance, ticks.append)
    expected = by_hand(kind, every or 1, noise.double().numpy(), 0.7, -0.4)
    np.testing.assert_allclose(latents.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert fake.rows == sum(ticks) == 2 * guidance.evaluations(schedule) == 2 * evaluations(kind, STEPS, every)
    if every == 1 or kind in ("rising", "falling"):
        unguided = Fake()
        plain = denoise(
            lambda x, t, text, w: unguided(x, t, text, w * 0 + 1), schedule, noise, text, empty, Guidance("cfg", W)
        ).numpy()
        same = np.abs(latents.numpy() - plain).max() < 1e-3 * np.abs(plain).max()
        # with a period of 1, cached differences and anchors equal CFG; a w that rises or falls does not
        assert same == (every == 1)


def test_every_row_fills_its_budget() -> None:
    import json

    config = json.loads((ASSETS / "emoji/scheduler/scheduler_config.json").read_text())
    for budget in BUDGETS:
        free = [c for c in at_budget(budget, [3.0]) if rule(c.method)[0] in RULES or c.method == "interval"]
        assert {c.method for c in free} == {m for m in METHODS if rule(m)[0] in RULES} | {"interval"}
        for c in free:
            used = c.guidance().evaluations(ddim(config, c.steps))
            one_more = c.guidance().evaluations(ddim(config, c.steps + 1))
            # the timesteps in an interval depend on the number of steps, so up to two evaluations may remain unused
            assert used <= budget and (one_more > budget or (c.method == "interval" and budget - used <= 2)), c
        assert set(at_budget(budget, [3.0])) <= set(all_cells()) | {Cell("C", "cfg", "emoji", budget, 3.0)}
    assert INTERVAL_STEPS.keys() == set(BUDGETS)
    assert most_steps("cached", 16, 3) == 12 and most_steps("anchors", 16, 8) == 12 and most_steps("residual", 8) == 7
    with pytest.raises(InputError, match="unknown budget 7; available: 50, 16, 12, 8"):
        at_budget(7, [3.0])


def test_invalid_periods_are_refused() -> None:
    for kind, every in (("cached", None), ("anchors", 0), ("residual", 2), ("cfg", 2)):
        with pytest.raises(
            InputError, match="cached and anchors need every of at least 1, and the other kinds take none"
        ):
            Guidance(kind, W, every=every)


def test_the_page_names_the_rules_that_beat_the_guide() -> None:
    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "count": 96}

    def group(method: str, steps: int, count: int) -> dict[str, Any]:
        return {"method": method, "steps": steps, "evaluations": count, "w": 3.0, "interval": None,
                "kid": estimate(0.1), "R@1": estimate(0.5), "distance_to_cfg": {}}  # fmt: skip

    def duel(method: str, gain: float) -> dict[str, Any]:
        return {"w": 3.0, "rival": {"method": method, "steps": 12, "evaluations": 16}, "rival_costs_no_more": True,
                "guide": {"method": "tiny", "steps": 16},
                "gain": {"kid": estimate(gain)},
                "wins": {"kid": "rival" if gain < 0 else "guide", "R@1": None}}  # fmt: skip

    duels = [duel("cached-3", 0.05), duel("anchors-8", -0.05)]
    document: dict[str, Any] = {
        "settings": {"budget": 16, "images": 96}, "verdicts": {"C": duels},
        "provenance": {"command": "c", "date": "2026-11-26T00:00", "versions": {"torch": "2"},
                       "device": {"processor": "p", "threads": 1}},
        "groups": [group("tiny", 16, 16), group("cached-3", 12, 16), group("anchors-8", 12, 16)],
    }  # fmt: skip
    text = free_report.page([(Path("made.json"), document)])
    assert "By KID, of the 2 rows within the budget, **shown to be better than the guide: tiny, CFG every 8th" in text
    assert "1 is shown to be worse" in text and "0.0500 [0.0400, 0.0600] ▲" in text
    assert "-0.0500 [-0.0600, -0.0400] ▼" in text
    assert "higher than the guide's in 0 of these rows" in text
    assert "FasterCache" in text and "StreamDiffusion" in text
    del document["settings"]["budget"]
    with pytest.raises(InputError, match="has no budget"):
        free_report.page([(Path("made.json"), document)])

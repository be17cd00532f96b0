"""Every cell of Tables A, B and C, as data.

- Table A: the teacher's CFG and guides over steps and w (Hsiao et al., CVPR 2024, figure 5).
- Table B: the same guides, untrained, in fine-tuned U-Nets (figure 8 there).
- Table C: methods without training, against the tiny guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pnp_trt.errors import InputError

from .free import RULES, most_steps
from .sampler import Guidance

TEACHER = "emoji"
FINE_TUNES = ("emoji-flat", "emoji-3d")
STEPS = (50, 16, 12, 8, 4)
SCALES = (2.0, 3.0, 5.0, 8.0)
HEADLINE_W = 3.0
HEADLINE_STEPS = (50, 16, 12, 8)
#: step counts for which stage 2 trains a guide
STAGE2_STEPS = (16, 8, 4)
FREE_SCALES = (3.0, 5.0)
#: steps and w at which fine-tunes are measured
TUNED_STEPS, TUNED_SCALES = (50, 16, 8), (3.0, 5.0)
HELD_OUT = ("held_out", "held_out_colour_shape")
SWEEP, SWEEP_IMAGES = "sweep", 128
#: the sweep's noise differs from that of reported cells, so that the best interval is not chosen on its own figures
SWEEP_SEED = 9
METHODS = {
    "cfg": "teacher CFG",
    "tiny": "tiny",
    "tiny-stage2": "tiny after stage 2",
    "full": "full",
    "none": "no guidance",
    "interval": "CFG on an interval",
    "cached-2": "CFG, difference cached for 2 steps",
    "cached-3": "CFG, difference cached for 3 steps",
    "cached-4": "CFG, difference cached for 4 steps",
    "residual": "R-CFG, one negative evaluation",
    "rising": "CFG, w rises",
    "falling": "CFG, w falls",
    "anchors-4": "tiny, CFG every 4th step",
    "anchors-8": "tiny, CFG every 8th step",
}
#: evaluations of the tiny guide's rows; each rule of :data:`~.free.RULES` takes the most steps within them
BUDGETS = (50, 16, 12, 8)
#: budget -> steps of CFG on an interval, of which about half are guided
INTERVAL_STEPS = {50: 32, 16: 10, 12: 7, 8: 5}
#: guided timesteps (t_low, t_high).  Kynkäänniemi et al. 2024 recommend σ in (0.28, 5.42] for SD-XL and (0.28, 2.9] for
#: EDM2-XXL, which are these timesteps of the bundled schedule; ``first-half`` drops guidance in the last half
INTERVALS = {"sdxl": (67, 628), "edm2": (67, 518), "first-half": (500, 999)}
BEST = "best"


@dataclass(frozen=True)
class Cell:
    """One set of images to sample and measure.

    Attributes:
        table: A, B or C.
        method: a key of :data:`METHODS`.
        base: the U-Net's name.
        steps, w: of the sampler; without guidance, w is only that of the cells it is compared with.
        seed: number of the noise set.
        captions: ``train``, ``held_out``, ``held_out_colour_shape``, a fine-tune's base name, or ``sweep``.
        interval: a key of :data:`INTERVALS`, or ``best``, which the sweep determines.
    """

    table: str
    method: str
    base: str
    steps: int
    w: float
    seed: int = 0
    captions: str = "train"
    interval: str | None = None

    @property
    def guide(self) -> str | None:
        """The name of the guide's folder; stage 2 trains one guide per step count."""
        if self.method == "tiny-stage2":
            return f"tiny-{self.steps}"
        if rule(self.method)[0] == "anchors":
            return "tiny"
        return self.method if self.method in ("tiny", "full") else None

    @property
    def untrained(self) -> bool:
        """Whether the method needs no training, apart from the guide that anchors are compared with."""
        return self.guide is None or rule(self.method)[0] in RULES

    @property
    def network(self) -> str:
        """U-Net and guide, by name."""
        return f"{self.base} + {self.guide}" if self.guide else self.base

    @property
    def group(self) -> tuple[str, str, str, int, float, str, str | None]:
        """Key of the cells that differ only in their noise."""
        return (self.table, self.method, self.base, self.steps, self.w, self.captions, self.interval)

    def guidance(self, best: str | None = None) -> Guidance:
        """The sampler's instructions; ``best`` is the interval that the sweep chose."""
        if self.method == "none":
            return Guidance("none")
        if self.method == "cfg":
            return Guidance("cfg", self.w)
        if self.method == "interval":
            name = best if self.interval == BEST else self.interval
            if name is None:
                raise InputError(
                    f"the best interval at {self.steps} steps and w = {self.w:g} is unknown before the sweep"
                )
            return Guidance("interval", self.w, INTERVALS[name])
        kind, every = rule(self.method)
        return Guidance(kind if kind in RULES else "guided", self.w, every=every)


def rule(method: str) -> tuple[str, int | None]:
    """Kind and period of a method named after a rule, such as ``cached-3``; otherwise the method and None."""
    kind, _, every = method.partition("-")
    return (kind, int(every) if every else None) if kind in RULES else (method, None)


def table_a(seeds: int) -> list[Cell]:
    """Steps × w on trained captions; for the headline rows also several noise sets and held-out captions."""
    grid = [("cfg", STEPS), ("tiny", STEPS), ("tiny-stage2", STAGE2_STEPS), ("full", STEPS)]
    out = [Cell("A", m, TEACHER, s, w) for m, steps in grid for s in steps for w in SCALES]
    headline = [(m, s) for m, steps in grid for s in steps if m != "full" and s in HEADLINE_STEPS]
    out += [Cell("A", m, TEACHER, s, HEADLINE_W, seed) for m, s in headline for seed in range(1, seeds)]
    return out + [
        Cell("A", m, TEACHER, s, HEADLINE_W, seed, captions)
        for captions in HELD_OUT for m, s in headline for seed in range(seeds)
    ]  # fmt: skip


def table_b() -> list[Cell]:
    """Each fine-tune with its own CFG, without guidance, and with the base's guides, not retrained."""
    out = []
    for base in FINE_TUNES:
        for steps in TUNED_STEPS:
            methods = ("none", "cfg", "tiny", "full") + (("tiny-stage2",) if steps in STAGE2_STEPS else ())
            out += [Cell("B", m, base, steps, w, captions=base) for w in TUNED_SCALES for m in methods]
    return out


def table_c() -> list[Cell]:
    """Methods without training, and the tiny guide.

    No guidance; CFG with fewer steps (25, 8, 6, 4: 50, 16, 12, 8 evaluations) and on intervals; all rules.
    """
    out = []
    for w in FREE_SCALES:
        for method, steps in (
            ("none", HEADLINE_STEPS), ("cfg", (50, 25, 16, 12, 8, 6, 4)), ("tiny", HEADLINE_STEPS),
            ("tiny-stage2", (16, 8)),
        ):  # fmt: skip
            out += [Cell("C", method, TEACHER, s, w) for s in steps]
        for s in (50, 16):
            out += [Cell("C", "interval", TEACHER, s, w, SWEEP_SEED, SWEEP, name) for name in INTERVALS]
            out.append(Cell("C", "interval", TEACHER, s, w, interval=BEST))
        for budget in BUDGETS:
            out += free_cells(budget, w)
    return out


def at_budget(budget: int, scales: Sequence[float]) -> list[Cell]:
    """Table C's rows of one budget, and CFG in 50 and in ``budget`` steps.

    Raises:
        InputError: for a budget that is not in :data:`BUDGETS`.
    """
    if budget not in BUDGETS:
        raise InputError(f"unknown budget {budget}; available: {', '.join(map(str, BUDGETS))}")
    out = []
    for w in scales:
        steps = {"cfg": (50, budget, budget // 2), "none": (budget,), "tiny": (budget,)}
        out += [Cell("C", m, TEACHER, s, w) for m, counts in steps.items() for s in dict.fromkeys(counts)]
        out += free_cells(budget, w)
    return sorted(out, key=lambda c: c.guide or "")


def free_cells(budget: int, w: float) -> list[Cell]:
    """Each rule of :data:`~.free.RULES` in the most steps within a budget, and CFG on an interval."""
    out = [Cell("C", "interval", TEACHER, INTERVAL_STEPS[budget], w, interval="sdxl")]
    for method in METHODS:
        kind, every = rule(method)
        if kind in RULES:
            out.append(Cell("C", method, TEACHER, most_steps(kind, budget, every), w))
    return out


def all_cells(seeds: int = 3) -> list[Cell]:
    """Every cell of the three tables, in sampling order: those without guides first, grouped by network.

    Raises:
        InputError: for fewer than 1 noise set, or so many that they include the sweep's.
    """
    if not 1 <= seeds <= SWEEP_SEED:
        raise InputError(f"seeds must be 1 to {SWEEP_SEED}, got {seeds}")
    cells = table_a(seeds) + table_b() + table_c()
    bases, guides = (TEACHER, *FINE_TUNES), ("tiny", "tiny-16", "tiny-8", "tiny-4", "full")
    # the sweep comes before cells with the best interval
    return sorted(
        cells,
        key=lambda c: (guides.index(c.guide) + 1 if c.guide else 0, bases.index(c.base), c.interval == BEST),
    )


def spared(cell: Cell) -> bool:
    """Whether ``--light`` leaves the cell out: about a third of the evaluations, but no headline rows."""
    return (
        (cell.table == "B" and cell.steps == 50)
        or (cell.method == "interval" and cell.w != HEADLINE_W)
        or (cell.method == "full" and cell.w in (2.0, 8.0))
        or (cell.captions in HELD_OUT and cell.seed > 0)
    )

"""Write ``docs/rivals.md`` from the record of ``measure``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pnp_trt.bundle.store import write_text
from pnp_trt.errors import InputError

from ..cells import TEACHER
from ..compare import outcome
from ..tables_report import DASH, marked, number, recall_of, table
from . import PAGE, Page
from .measure import CFG, NONE, OURS, SCHEMA
from .world import BASES

Row = dict[str, Any]
#: parameters within this factor of the tiny guide's count as the same budget
SAME_BUDGET = 1.1

TEXT = """# {title}

Written by `python -m benchmarks.emoji.rivals report{options}` from `{record}`, which was made by
`{command}` ({date}, {where}, torch {torch}).

Classifier-free guidance (CFG) takes two evaluations of the U-Net per step. Each rival below takes one and leaves the
weights of the U-Net unchanged. All rivals were trained from scratch on the bundled base for {steps:,} optimizer steps
of {batch} states. The states are new in every step and chosen in the same way for all rivals ({states}). Loss: {loss}.
Optimizer: AdamW with averaged weights; one training seed. Each rival is then used in both fine-tunes without further
training. The change that a rival makes is multiplied by (w − 1), so that the prediction at w = 1 is exactly the
conditional one; the other papers' forms have no such factor.

**Read the tables with these limits in mind.** The papers train for longer, on larger models, with their own losses and
states. {rates} The tables compare only the forms, at a short and equal budget.

## The rivals and their cost

{forms}

Parameters are the trained ones. MACs are at batch 1 and include attention products: those added to each evaluation of
the U-Net (which itself takes {macs_of_unet:.1f} MMACs), and those computed once per image.{unequal}

{cost}

## How it is measured

**KID** (EfficientNet-KID) is not FID; compare it only with itself. **R@1, R@5**: the shares of images whose caption a
frozen judge, trained on two other artists' styles, ranks first or among the first five of all captions. **PSNR** and
**cosine** compare an image with the one that the same U-Net generates with CFG at the same number of steps, from the
same caption, noise and w. **Gain** is the gain in KID, paired by caption and noise; above 0 is better. **Chroma** is
the mean strength of colour. Brackets are 95 % intervals over images; ▲ marks a gain and ▼ a loss whose interval
excludes 0. Each row has {images} images of trained captions from one set of noise.
{ceiling}

{verdicts}

## On the base
{base}

## In the fine-tunes, untrained
{tuned}

{paired}## Error on fresh states
The share of the squared guidance term eps_w − eps(c) that a rival leaves unexplained (1: it explains nothing), by
range of timesteps (0 is clean). The {error_states:,} states, noised images and trajectories of CFG, are the same for
all rivals. The last two columns, over all timesteps, are the length of the rival's change relative to the teacher's and
its cosine with the teacher's.

{error}
"""


def _titles(document: Row) -> dict[str, str]:
    return {NONE: "no guidance", CFG: "CFG", **{n: r["title"] for n, r in document["rivals"].items()}}


def forms(document: Row) -> str:
    return "\n".join(f"- **{r['title']}**: {r['source']}" for r in document["rivals"].values())


def cost(document: Row) -> str:
    whole = document["settings"]["training"]["parameters_of_unet"]
    rows = [
        [r["title"], f"{r['parameters']:,}", f"{r['parameters'] / whole:.1%}",
         f"{r['macs_per_evaluation'] / 1e6:.2f} ({r['macs_per_evaluation'] / r['macs_of_unet']:.1%})",
         f"{r['macs_per_image'] / 1e6:.2f}" if r["macs_per_image"] else DASH, f"{r['lr']:.2g}",
         f"{r['milliseconds_per_step']:.0f}"]
        for r in document["rivals"].values()
    ]  # fmt: skip
    head = ["rival", "parameters", "of the U-Net", "MMACs added per evaluation", "MMACs once per image",
            "learning rate", "ms per training step"]  # fmt: skip
    return table(head, rows)


def unequal(document: Row) -> str:
    """Sentence that lists the rivals with a different budget of parameters."""
    own = document["rivals"].get(OURS)
    if own is None:
        return ""
    off = [
        f"{r['title']} ({r['parameters'] / own['parameters']:.1f} ×)" for r in document["rivals"].values()
        if not 1 / SAME_BUDGET <= r["parameters"] / own["parameters"] <= SAME_BUDGET
    ]  # fmt: skip
    return f" Rivals with a different parameter budget than the tiny guide: {'; '.join(off)}." if off else ""


def _gain(gain: Row | None) -> str:
    return marked(gain["kid"]) if gain else DASH


def rates(rivals: Sequence[Row]) -> str:
    """Sentences on how the learning rates were chosen."""
    pilots = {r["pilot_steps"] for r in rivals}
    if pilots == {0}:
        return "Learning rates were chosen before this run, without a search in it."
    if len(pilots) > 1:
        raise InputError(f"the rivals' pilots differ in steps: {sorted(pilots)}; train them again")
    text = (
        "Each rival's learning rate is the one of three candidates, a factor of three apart, with the lowest loss on "
        f"fresh states after {pilots.pop()} steps."
    )
    ends = [r["title"] for r in rivals if r["lr"] in (min(tried := _tried(r)), max(tried))]
    if ends:
        which = "every rival" if len(ends) == len(rivals) else "; ".join(ends)
        text += f" For {which} it is the highest or lowest of the three, so better rates may lie outside this range."
    return text


def _tried(rival: Row) -> list[float]:
    """The rates of a rival's pilot: the chosen one as recorded, the others to two digits."""
    return [rival["lr"] if math.isclose(float(k), rival["lr"], rel_tol=0.05) else float(k) for k in rival["pilot_loss"]]


HEAD = ("method", "evaluations", "KID ↓", "R@1, % ↑", "R@5, % ↑", "PSNR, dB ↑", "cosine ↑", "chroma",
        "KID gain over CFG ↑", "KID gain over no guidance ↑")  # fmt: skip


def _row(cell: Row, titles: dict[str, str]) -> list[str]:
    distance = cell.get("distance_to_cfg", {})
    return [
        titles[cell["method"]], str(cell["evaluations"]), number(cell["kid"]), recall_of(cell, 1), recall_of(cell, 5),
        number(distance.get("psnr_db"), 1), number(distance.get("feature_cosine"), 3), f"{cell['chroma']:.3f}",
        _gain(cell.get("gain_over_cfg")), _gain(cell.get("gain_over_none")),
    ]  # fmt: skip


def cells(document: Row, bases: Sequence[str]) -> str:
    """A table for each base, number of steps and w, methods in the registry's order."""
    titles, out = _titles(document), []
    for base in bases:
        mine = [c for c in document["cells"] if c["base"] == base]
        for steps, w in dict.fromkeys((c["steps"], c["w"]) for c in mine if c["method"] != NONE):
            at = [c for c in mine if c["steps"] == steps and (c["w"] == w or c["method"] == NONE)]
            title = f"{base}, {steps} steps, w = {w:g}"
            out.append(f"\n### {title}\n\n{table(HEAD, [_row(c, titles) for c in at])}")
    return "\n".join(out)


def paired(document: Row) -> str:
    """Section with the paired differences to the tiny guide; empty for records without them."""
    titles = _titles(document)
    at = [c for c in document["cells"] if "gain_over_ours" in c]
    if not at:
        return ""
    rows = [
        [titles[c["method"]], c["base"], str(c["steps"]), f"{c['w']:g}", marked(c["gain_over_ours"]["kid"]),
         marked(c["gain_over_ours"]["R@1"], 1, 100), marked(c["gain_over_ours"]["psnr_db"], 2)]
        for name in titles for c in at if c["method"] == name
    ]  # fmt: skip
    head = ["method", "U-Net", "steps", "w", "KID gain ↑", "R@1 gain, points ↑", "PSNR gain, dB ↑"]
    return (
        f"## Compared with the {titles[OURS]}\nPaired by caption and noise; above 0 the method is better. The PSNR "
        f"gain is how much nearer to CFG's images it is.\n\n{table(head, rows)}\n\n"
    )


def error(document: Row) -> str:
    out = []
    for base in BASES:
        errors = {n: r["error"][base] for n, r in document["rivals"].items() if base in r["error"]}
        if not errors:
            continue
        bins = [k for k in next(iter(errors.values())) if k != "all"]
        rows = [
            [document["rivals"][n]["title"], f"{e['all']['residual']:.3f}", *(f"{e[k]['residual']:.3f}" for k in bins),
             f"{e['all']['length']:.2f}", f"{e['all']['cosine']:.2f}"]
            for n, e in errors.items()
        ]  # fmt: skip
        head = ["rival", "all", *(k.replace("-", "–") for k in bins), "length", "cosine"]
        out.append(f"**{base}**\n\n{table(head, rows)}")
    return "\n\n".join(out) or "Not measured in this run."


def _best(rows: Sequence[Row], key: str) -> Row:
    return max(rows, key=lambda c: c["distance_to_cfg"]["psnr_db"]["value"] if key == "psnr" else -c["kid"]["value"])


def verdicts(document: Row) -> str:
    """For each table: the rivals closest to CFG by PSNR and of the lowest KID, and those worse than CFG."""
    titles, lines = _titles(document), []
    for base, steps, w in dict.fromkeys(
        (c["base"], c["steps"], c["w"]) for c in document["cells"] if c["method"] != NONE
    ):
        at = [c for c in document["cells"]
              if (c["base"], c["steps"], c["w"]) == (base, steps, w) and "gain_over_cfg" in c]  # fmt: skip
        if not at:
            continue
        near, low = _best(at, "psnr"), _best(at, "kid")
        worse = [titles[c["method"]] for c in at if outcome(c["gain_over_cfg"]["kid"]) == "worse"]
        helps = [titles[c["method"]] for c in at if outcome(c["gain_over_none"]["kid"]) == "better"]
        lines.append(
            f"- {base}, {steps} steps, w = {w:g}. Closest to CFG's images: {titles[near['method']]} "
            f"({number(near['distance_to_cfg']['psnr_db'], 1)} dB). Lowest KID: {titles[low['method']]} "
            f"({number(low['kid'])}). Shown to be worse than CFG by KID: {'; '.join(worse) or 'none'}. Shown to be "
            f"better than no guidance: {'; '.join(helps) or 'none'}."
        )
    return "\n".join(lines) or "No rival was measured in this run."


def write_report(document: Row, path: Path, page: Page = PAGE) -> None:
    """Write ``page`` to ``path``.

    Raises:
        InputError: if the JSON is not a record of ``measure``.
    """
    if not str(document.get("schema", "")).startswith(SCHEMA.rpartition("/")[0]):
        raise InputError("this JSON is not a record of the rivals; run: python -m benchmarks.emoji.rivals measure")
    facts, settings = document["provenance"], document["settings"]
    training, rivals = settings["training"], list(document["rivals"].values())
    counts = sorted({(r["steps"], r["batch"]) for r in rivals})
    if len(counts) > 1:
        raise InputError(f"the rivals differ in training steps or batch size: {counts}; train them again")
    device = facts["device"]
    ceilings = [f"{base}, R@1 {recall_of(r, 1)} %, chroma {r['chroma']:.3f}" for base, r in document["real"].items()]
    text = TEXT.format(
        title=page.title, options=page.options, record=page.record, paired=paired(document),
        command=facts["command"], date=facts["date"][:10], where=device["gpu"] or device["processor"],
        torch=facts["versions"]["torch"], steps=counts[0][0], batch=counts[0][1], states=training["states"],
        loss=training["loss"], forms=forms(document), macs_of_unet=rivals[0]["macs_of_unet"] / 1e6,
        unequal=unequal(document), cost=cost(document), images=settings["images"],
        rates=rates(rivals) + page.note, ceiling=f"The artists' own images: {'; '.join(ceilings)}.",
        verdicts=verdicts(document),
        base=cells(document, [TEACHER]), tuned=cells(document, BASES[1:]),
        error_states=settings["error_batch"] * settings["error_rounds"], error=error(document),
    )  # fmt: skip
    write_text(text, path)

"""Write ``docs/no-training.md``: methods without training against the tiny guide, at equal evaluations.

Each record is one of ``python -m benchmarks.emoji.tables --budget N``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pnp_trt.errors import InputError

from ..records import machine_said, read
from .cells import BUDGETS, METHODS, rule
from .free import RULES
from .tables_report import DASH, distances, marked, name, number, recall_of, table

RESULTS = tuple(Path(f"benchmarks/results/emoji-free-{budget}.json") for budget in BUDGETS)
DOCUMENT = Path("docs/no-training.md")

TEXT = """# Guidance without training, at an equal number of evaluations

Written by `python -m benchmarks.emoji.free_report`. Each section has a budget of U-Net evaluations per image. Every
method takes as many steps as fit into the budget; CFG with more evaluations is included for comparison.

KID, R@1 and distance are defined in [the tables](distillation-tables.md). KID is unbiased, so its value may be below
0 with few images; the paired gains have narrower intervals. *Guide's gain* is the gain in KID of the tiny guide, which
takes as many steps as the budget, over the row's method, paired by caption and noise; above 0 the guide is better.
Brackets are 95 % intervals. ▲ marks rows that are shown to be worse than the guide, ▼ rows that are shown to be better:
the interval of the gain excludes 0.
{budgets}

## The rules
{rules}
"""

BUDGET = """
## {budget} evaluations
{images} images of trained captions from one set of noise; w = {scales}. Distance is to CFG's image at {target} steps.
The record `{source}` was made by
`{command}` ({date}, {machine}, torch {torch}).

{found}

{rows}"""


def page(documents: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """Render the page from (file, record) of each budget.

    Raises:
        InputError: if a record is not one of the tables at one budget.
    """
    by_kind: dict[str, list[str]] = {}
    for m in METHODS:
        if rule(m)[0] in RULES:
            by_kind.setdefault(rule(m)[0], []).append(METHODS[m])
    rules = [
        f"- *{'*, *'.join(names)}*: {' '.join((RULES[kind].__doc__ or '').split())}" for kind, names in by_kind.items()
    ]
    return TEXT.format(budgets="\n".join(one_budget(d, file) for file, d in documents), rules="\n".join(rules))


def one_budget(document: dict[str, Any], source: Path) -> str:
    """Section of one record."""
    budget = document.get("settings", {}).get("budget")
    if budget is None:
        raise InputError(f"{source} has no budget; run: python -m benchmarks.emoji.tables --budget 16")
    stated, groups = document["provenance"], document["groups"]
    target = 50 if any("50" in g["distance_to_cfg"] for g in groups) else budget
    duels = {(d["w"], d["rival"]["method"], d["rival"]["steps"]): d for d in document["verdicts"]["C"]}
    blocks = []
    for w in dict.fromkeys(g["w"] for g in groups):
        rows = []
        for g in sorted((g for g in groups if g["w"] == w), key=lambda g: (-g["evaluations"], g["kid"]["value"])):
            duel = duels.get((w, g["method"], g["steps"]))
            gain = DASH if duel is None else marked(duel["gain"]["kid"])
            rows.append([name(g), str(g["steps"]), str(g["evaluations"]), number(g["kid"]), recall_of(g, 1),
                         distances(g, target), gain])  # fmt: skip
        head = ("method", "steps", "evaluations", "KID ↓", "R@1, % ↑", "PSNR, dB / cosine ↑", "guide's gain in KID ↑")
        blocks.append(f"**w = {w:g}**\n\n{table(head, rows)}")
    return BUDGET.format(
        source=source.as_posix(), command=stated["command"], date=stated["date"][:10], machine=machine_said(document),
        torch=stated["versions"]["torch"], budget=budget, target=target, images=document["settings"]["images"],
        scales=", ".join(f"{w:g}" for w in dict.fromkeys(g["w"] for g in groups)),
        found=finding(document, target), rows="\n\n".join(blocks),
    )  # fmt: skip


def finding(document: dict[str, Any], target: int) -> str:
    """Sentences on the rows of no more evaluations: better or worse than the guide, and closer to CFG.

    Args:
        target: steps of the CFG images to which distances are measured.
    """
    fair = [d for d in document["verdicts"]["C"] if d["rival_costs_no_more"]]
    lines = []
    for key, what in (("kid", "KID"), ("R@1", "R@1")):
        won = [f"{METHODS[d['rival']['method']]} (w = {d['w']:g})" for d in fair if d["wins"][key] == "rival"]
        lost = sum(d["wins"][key] == "guide" for d in fair)
        better = (
            f"**shown to be better than the guide: {', '.join(won)}**"
            if won
            else "none is shown to be better than the guide"
        )
        worse = f"{lost} {'is' if lost == 1 else 'are'} shown to be worse"
        lines.append(f"By {what}, of the {len(fair)} rows within the budget, {better}; {worse}.")
    psnr = {
        (g["w"], g["method"], g["steps"]): by_steps[str(target)]["psnr_db"]["value"]
        for g in document["groups"]
        if str(target) in (by_steps := g["distance_to_cfg"])
    }
    closer = 0
    for d in fair:
        own = psnr.get((d["w"], d["guide"]["method"], d["guide"]["steps"]), float("inf"))
        closer += psnr.get((d["w"], d["rival"]["method"], d["rival"]["steps"]), float("-inf")) > own
    lines.append(f"The mean PSNR to CFG's images is higher than the guide's in {closer} of these rows.")
    return " ".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji.free_report", description=__doc__)
    parser.add_argument("--json", type=Path, nargs="+", default=RESULTS, help="one record per budget")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    a = parser.parse_args(arguments)
    try:
        for file in a.json:
            if not file.is_file():
                raise InputError(
                    f"{file} does not exist; run: python -m benchmarks.emoji.tables --budget N --json {file}, "
                    f"where N is one of {', '.join(map(str, BUDGETS))}"
                )
        a.document.write_text(page([(file, read(file)) for file in a.json]))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

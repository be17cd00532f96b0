"""Write ``docs/distillation-tables.md`` with its grid and plot, from the tables' record and the cached images.

Table B is from the fine-tunes' own record if there is one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from pnp_trt.bundle.store import write_text
from pnp_trt.errors import InputError

from ..records import machine_said, read
from .cells import FINE_TUNES, FREE_SCALES, HEADLINE_W, METHODS, SCALES, Cell, all_cells
from .compare import outcome
from .tables_figures import chosen_strips, grid, plot

Row = dict[str, Any]
DASH = "–"

TEXT = """# Distillation on the bundled model, in tables

Written by `python -m benchmarks.emoji.tables_report` from `benchmarks/results/emoji-tables.json`, which was made by
`{command}` ({date}, {machine}, torch {torch}).

**EfficientNet-KID** is the unbiased kernel distance (cubic kernel) between EfficientNet-Lite0 features of generated and
real images of the same captions. It is not FID; compare it only with itself. **R@1, R@5**: the shares of images whose
caption a frozen judge, trained on two other artists' styles, ranks first or among the first five of all captions.
**Distance** is to the image that the same U-Net generates with CFG at 50 steps from the same caption, noise and w: PSNR
in dB and cosine of EfficientNet features. **Gain** is paired by caption and noise; above 0 is better.
Brackets are 95 % intervals; ▲ marks a gain and ▼ a loss whose interval excludes 0. Each cell has n = {images}
images of trained captions. {seeds}
**NFE** is the number of model evaluations (forward passes of the U-Net) per image. **GMACs** are per image and include
the text encoder and the decoder. The first figure counts only convolutions and linear layers, as the paper does; the
second adds attention products.
"No worse" means that the interval of the gain contains 0 or lies above it: no loss was shown. This does not prove that
there is no loss; the lower end of the interval bounds its size.
{real}
![EfficientNet-KID against steps](distillation-kid.png)

{grid}
## Table A: guides against CFG, over steps and w
{verdict_a}

### EfficientNet-KID ↓
{a_kid}

### Gain in KID over CFG at 50 steps, same w ↑
{a_gain}

### Alignment: R@1 / R@5, % ↑
{a_recall}

### Distance to the CFG image at 50 steps: PSNR, dB / feature cosine ↑
{a_distance}

### Distance to the CFG image at the same number of steps, for information
{a_same}

### Held-out captions, w = {headline:g}
All held-out captions. Neither the guides nor the U-Net were trained on them.

{held_out}

## Table B: the same guides in fine-tuned U-Nets, without further training
The guides were distilled on the base only. Captions, real images and CFG are the fine-tune's own.{b_made}
{verdict_b}

{b}

## Table C: methods without training
The rows are no guidance, CFG with fewer steps (25, 8 and 4 steps take the 50, 16 and 8 NFE of a guide), and CFG on an
interval of timesteps only (Kynkäänniemi et al. 2024): the best of three intervals by KID on {sweep} images from other
noise. Cached differences, R-CFG, anchors, and w that varies over the steps are defined in `benchmarks/emoji/free.py`.
They take as many steps as fit into 50, 16 or 8 evaluations; see [their own page](no-training.md).
{verdict_c}

{c}

### The intervals tried
{c_sweep}

## Left out
{left}

## How it was sampled
DDIM, η = 0, float32 latents and updates. Each network ran in the fastest form whose images agree with those of eager
float32 to at least 30 dB mean PSNR, on a few images at w = 8.

{networks}
"""


def seeds_said(seeds: int) -> str:
    """Sentences on the noise sets and intervals of the cells."""
    if seeds == 1:
        return "All images come from one set of noise (R@k: Wilson's interval)."
    return f"""The headline rows have {seeds} sets of noise. Their value is the mean of the {seeds}, and
its interval resamples captions, because images of one caption are not independent. The JSON has each set separately.
The other rows have one set (R@k: Wilson's interval)."""


def number(e: Row | None, digits: int = 4, scale: float = 1.0) -> str:
    """``value [low, high]``."""
    if e is None:
        return DASH
    value, low, high = (scale * e[k] for k in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def recall_of(row: Row, k: int) -> str:
    return number(row[f"R@{k}"], 1, 100)


def marked(gain: Row, digits: int = 4, scale: float = 1.0) -> str:
    """A gain with its interval, and ▲ or ▼ if that excludes 0."""
    return number(gain, digits, scale) + {"better": " ▲", "worse": " ▼"}.get(outcome(gain), "")


def kid_gain(row: Row, against: int | None) -> str:
    """Paired KID gain over CFG at ``against`` steps, or over no guidance."""
    gains = row["gain_over_none"] if against is None else row["gain_over_cfg"].get(str(against))
    return marked(gains["kid"]) if gains else DASH


def distances(row: Row, steps: int) -> str:
    values = row["distance_to_cfg"].get(str(steps))
    return DASH if not values else f"{number(values['psnr_db'], 1)} / {number(values['feature_cosine'], 2)}"


def name(row: Row) -> str:
    """Label of a method, with the timesteps of an interval."""
    label = METHODS[row["method"]]
    if row.get("interval"):
        label += f", t {row['timesteps'][0]}–{row['timesteps'][1]}"
    return label


def work(row: Row) -> str:
    return f"{row['macs_per_image_without_attention'] / 1e9:.1f} / {row['macs_per_image'] / 1e9:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or a sentence if it is empty."""
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    if not lines:
        return "Not measured in this run."
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])


def by_w(groups: Sequence[Row], show: Callable[[Row], str]) -> str:
    """Table in the form of Table A: a row for each method and steps, a column for each w."""
    mine = [g for g in groups if g["table"] == "A" and g["captions"] == "train"]
    keys = list(dict.fromkeys((g["method"], g["steps"]) for g in mine))
    keys.sort(key=lambda k: (list(METHODS).index(k[0]), -k[1]))
    rows = []
    for method, steps in keys:
        at = {g["w"]: g for g in mine if (g["method"], g["steps"]) == (method, steps)}
        first = next(iter(at.values()))
        cells = [show(at[w]) + (f" ({len(at[w]['seeds'])} noises)" if len(at[w]["seeds"]) > 1 else "")
                 if w in at and show(at[w]) != DASH else DASH for w in SCALES]  # fmt: skip
        if set(cells) != {DASH}:
            rows.append([METHODS[method], str(steps), str(first["evaluations"]), work(first), *cells])
    return table(["method", "steps", "NFE", "GMACs", *(f"w = {w:g}" for w in SCALES)], rows)


WIDE = ("method", "steps", "NFE", "GMACs", "KID ↓", "R@1, % ↑", "R@5, % ↑", "PSNR, dB / cosine ↑")


def wide(row: Row) -> list[str]:
    return [
        name(row), str(row["steps"]), str(row["evaluations"]), work(row), number(row["kid"]), recall_of(row, 1),
        recall_of(row, 5), distances(row, 50),
    ]  # fmt: skip


def held_out(groups: Sequence[Row]) -> str:
    out = []
    for captions, title in (("held_out", "Concepts"), ("held_out_colour_shape", "Colour × shape")):
        mine = [g for g in groups if g["table"] == "A" and g["captions"] == captions]
        mine.sort(key=lambda g: (list(METHODS).index(g["method"]), -g["steps"]))
        count = f", n = {mine[0]['kid']['count']}" if mine else ""
        if mine and len(mine[0]["seeds"]) > 1:
            count += f", mean of {len(mine[0]['seeds'])} sets of noise"
        rows = [[*wide(g), kid_gain(g, 50)] for g in mine]
        out.append(f"**{title}{count}**\n\n{table([*WIDE, 'KID gain over CFG 50 ↑'], rows)}")
    return "\n\n".join(out)


def table_b(groups: Sequence[Row]) -> str:
    out = []
    for base in FINE_TUNES:
        mine = [g for g in groups if g["table"] == "B" and g["base"] == base]
        mine.sort(key=lambda g: (g["w"], -g["steps"], list(METHODS).index(g["method"])))
        rows = [[f"{g['w']:g}", *wide(g), kid_gain(g, g["steps"]), kid_gain(g, None)] for g in mine]
        head = ["w", *WIDE, "KID gain over own CFG, same steps ↑", "KID gain over no guidance ↑"]
        out.append(f"**{base}**\n\n{table(head, rows)}")
    return "\n\n".join(out)


def table_c(groups: Sequence[Row]) -> str:
    out = []
    for w in FREE_SCALES:
        mine = [g for g in groups if g["table"] == "C" and g["w"] == w and g["captions"] == "train"]
        mine.sort(key=lambda g: (-g["evaluations"], list(METHODS).index(g["method"])))
        rows = [[*wide(g), kid_gain(g, 50)] for g in mine]
        out.append(f"**w = {w:g}**\n\n{table([*WIDE, 'KID gain over CFG 50 ↑'], rows)}")
    return "\n\n".join(out)


def sweep(groups: Sequence[Row]) -> str:
    mine = [g for g in groups if g["captions"] == "sweep"]
    mine.sort(key=lambda g: (g["w"], -g["steps"], g["kid"]["value"]))
    rows = [
        [f"{g['w']:g}", str(g["steps"]), f"{g['timesteps'][0]}–{g['timesteps'][1]} ({g['interval']})",
         str(g["evaluations"]), number(g["kid"]), recall_of(g, 1)] for g in mine
    ]  # fmt: skip
    return table(["w", "steps", "guided timesteps", "NFE", "KID ↓", "R@1, % ↑"], rows)


def verdict_a(document: Row) -> str:
    lines = []
    for v in document["verdicts"]["A"]:
        if not v["measured"]:
            lines.append(f"- {v['goal']}: **not measured** in this run.")
            continue
        seeds = f"mean of {v['seeds']} sets of noise" if v["seeds"] > 1 else "one set of noise"
        lines.append(
            f"- {v['goal']}: **{'yes' if v['reached'] else 'no'}** by KID, w = {v['w']:g} ({v['kid']}; gain "
            f"{number(v['gain']['kid'])}, {seeds}); R@1: {v['R@1']} "
            f"({number(v['gain']['R@1'], 1, 100)} points)."
        )
    return "\n".join(lines)


def verdict_b(document: Row) -> str:
    lines = []
    for v in document["verdicts"]["B"]:
        clauses = []
        for key, what in (("against_cfg", "its own CFG"), ("against_none", "no guidance")):
            result = v[key]
            if result:
                clauses.append(
                    f"compared with {what}, {result['kid']} by KID (gain {number(result['gain']['kid'])}), "
                    f"{result['R@1']} by R@1"
                )
        clauses = clauses or ["not compared with anything"]
        lines.append(
            f"- {METHODS[v['method']]} in {v['base']}, {v['steps']} steps, w = {v['w']:g}: {'; '.join(clauses)}."
        )
    return "\n".join(lines) or "No guide was measured in this run."


def _rivals(duels: Sequence[Row], key: str) -> str:
    """The rivals that won, each with its NFE and the guide's (negative) gain over it."""
    scale, digits = (1, 4) if key == "kid" else (100, 1)
    return ", ".join(
        f"{METHODS[d['rival']['method']]} at {d['rival']['steps']} steps ({d['rival']['evaluations']} NFE; the guide's "
        f"gain over it is {number(d['gain'][key], digits, scale)})" for d in duels
    )  # fmt: skip


def verdict_c(document: Row) -> str:
    """For each guide cell, the rivals without training that beat it at no more NFE, and those with more NFE."""
    duels = document["verdicts"]["C"]
    lines = []
    for w, method, steps in dict.fromkeys((d["w"], d["guide"]["method"], d["guide"]["steps"]) for d in duels):
        mine = [d for d in duels if (d["w"], d["guide"]["method"], d["guide"]["steps"]) == (w, method, steps)]
        fair = [d for d in mine if d["rival_costs_no_more"]]
        clauses = []
        for key, label in (("kid", "KID"), ("R@1", "R@1")):
            won = [d for d in fair if d["wins"][key] == "rival"]
            lost = sum(d["wins"][key] == "guide" for d in fair)
            better = (
                f"**better by {label}: {_rivals(won, key)}**" if won else f"no method is shown to be better by {label}"
            )
            clauses.append(f"{better} ({lost} of {len(fair)} shown to be worse)")
        line = f"- Against {METHODS[method]} at {mine[0]['guide']['evaluations']} NFE, w = {w:g}: with no more NFE, "
        line += "; ".join(clauses)
        dearer = [d for d in mine if not d["rival_costs_no_more"] and d["wins"]["kid"] == "rival"]
        lines.append(line + (f"; with more NFE, better by KID: {_rivals(dearer, 'kid')}." if dearer else "."))
    return "\n".join(lines) or "No guide was measured in this run."


def left_out(document: Row) -> str:
    """List of the cells that were not measured, by reason."""
    reasons: dict[str, list[Row]] = {}
    for cell in (*document["left_out"], *newer(document)):
        reasons.setdefault(cell["reason"], []).append(cell)
    lines = []
    for reason, cells in reasons.items():
        kinds: dict[tuple[str, str, str], Counter[tuple[int, float]]] = {}
        for c in cells:
            what = c["captions"] if c["table"] == "A" else c["base"]
            kinds.setdefault((c["table"], c["method"], what), Counter())[c["steps"], c["w"]] += 1
        lines.append(f"- {reason} ({len(cells)} cell{'s' * (len(cells) > 1)}):")
        for (letter, method, what), counted in kinds.items():
            scales_by_steps: dict[tuple[int, ...], list[float]] = {}  # step counts -> scales that have them
            for w in sorted({w for _, w in counted}):
                scales_by_steps.setdefault(tuple(sorted({s for s, v in counted if v == w}, reverse=True)), []).append(w)
            settings = "; ".join(
                f"{', '.join(map(str, steps))} steps, w = {', '.join(f'{w:g}' for w in scales)}"
                for steps, scales in scales_by_steps.items()
            )
            lines.append(f"  - Table {letter}, {METHODS[method]}, {what}: {settings}")
    return "\n".join(lines) or "Nothing: every cell was measured."


def made_at(record: Row) -> datetime:
    """Date and time of a record."""
    return datetime.fromisoformat(record["provenance"]["date"])


def with_fine_tunes(document: Row, fine_tunes: Row) -> Row:
    """Replace Table B, including the cells it left out, by that of another record."""

    def merged(key: str) -> list[Row]:
        return [c for c in document[key] if c["table"] != "B"] + [c for c in fine_tunes[key] if c["table"] == "B"]

    verdicts = {**document["verdicts"], "B": fine_tunes["verdicts"]["B"]}
    return {
        **document, **{key: merged(key) for key in ("cells", "groups", "left_out")}, "verdicts": verdicts,
        "real": {**document["real"], **fine_tunes["real"]},
    }  # fmt: skip


def newer(document: Row) -> list[Row]:
    """Cells of the tables that the record neither has nor leaves out, because they were added later."""
    known = {Cell(**{f.name: c[f.name] for f in fields(Cell)}).group for c in document["cells"] + document["left_out"]}
    added = [c for c in all_cells(1) if c.group not in known]
    return [{**asdict(c), "reason": "added to the tables after this record was made"} for c in added]


def networks(document: Row) -> str:
    rows = []
    for key, r in document["networks"].items():
        if r is None:
            continue
        levels = ", ".join(f"{k}: {v:.1f}" for k, v in r["psnr_db"].items()) or DASH
        rows.append(
            [key, r["precision"] + (", compiled" if r["compiled"] else ", eager"), levels, r["trouble"] or DASH]
        )
    return table(["network", "form", "PSNR to float32, dB", "remark"], rows)


def write_report(
    document: Row, cache: Path, docs: Path, fine_tunes: Row | None = None, text_only: bool = False
) -> None:
    """Write the document, the grid and the plot into ``docs``.

    Args:
        fine_tunes: a record of Table B, which replaces the document's own unless that is newer.
        text_only: leave the grid and the plot as they are.

    Raises:
        InputError: if a record is not one of the tables, or its images are not in ``cache``.
    """
    for record in (document, fine_tunes or document):
        if not str(record.get("schema", "")).startswith("pnp-trt/emoji-tables/"):
            raise InputError("this JSON is not a record of the tables; run: python -m benchmarks.emoji.tables")
    if not text_only:
        try:
            grid(document, cache, docs / "distillation-grid.png")
        except FileNotFoundError as error:
            raise InputError(
                f"the cached image set {Path(error.filename).name} is missing; run the tables again, or give "
                "--text-only to keep the grid and the plot"
            ) from error
        plot(document, docs / "distillation-kid.png")
    facts, missing = document["provenance"], chosen_strips(document)[1]
    source_of_b = ""
    if fine_tunes is not None and made_at(fine_tunes) > made_at(document):
        document, apart = with_fine_tunes(document, fine_tunes), fine_tunes["provenance"]
        source_of_b = (
            f"\nTable B is from `benchmarks/results/emoji-fine-tunes.json`, which was made by `{apart['command']}` "
            f"({apart['date'][:10]}, {machine_said(fine_tunes)})."
        )
    groups = document["groups"]
    about = "Columns are trained captions, each from one noise, at w = 3; * marks the guide after stage 2."
    about += f" Not measured in this run: {'; '.join(missing)}." if missing else ""
    ceilings = [
        f"real images of the {n} captions reach R@1 {recall_of(r, 1)} %, R@5 {recall_of(r, 5)} %"
        for n, r in document["real"].items() if n not in ("sweep",)
    ]  # fmt: skip
    text = TEXT.format(
        command=facts["command"] or "python -m benchmarks.emoji.tables", date=facts["date"][:10],
        machine=machine_said(document), torch=facts["versions"]["torch"],
        images=document["settings"]["images"], seeds=seeds_said(document["settings"]["seeds"]), headline=HEADLINE_W,
        real=f"Ceilings: {'; '.join(ceilings)}.\n" if ceilings else "",
        grid=f"![Images by method](distillation-grid.png)\n\n*{about}*\n",
        verdict_a=verdict_a(document), b_made=source_of_b, verdict_b=verdict_b(document), verdict_c=verdict_c(document),
        a_kid=by_w(groups, lambda g: number(g["kid"])),
        a_gain=by_w(groups, lambda g: kid_gain(g, 50)),
        a_recall=by_w(groups, lambda g: f"{recall_of(g, 1)} / {recall_of(g, 5)}"),
        a_distance=by_w(groups, lambda g: distances(g, 50)),
        a_same=by_w(groups, lambda g: DASH if g["steps"] == 50 else distances(g, g["steps"])),
        held_out=held_out(groups), b=table_b(groups), c=table_c(groups), c_sweep=sweep(groups),
        sweep=len(document["captions"].get("sweep", [])), left=left_out(document), networks=networks(document),
    )  # fmt: skip
    write_text(text, docs / "distillation-tables.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji.tables_report", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, default=Path("benchmarks/results/emoji-tables.json"))
    add("--fine-tunes", type=Path, default=Path("benchmarks/results/emoji-fine-tunes.json"), help="Table B's record")
    add("--cache", type=Path, default=Path("build/emoji"), help="folder in which the tables cached their images")
    add("--text-only", action="store_true", help="leave the grid and the plot as they are")
    add("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    try:
        if not args.json.is_file():
            raise InputError(f"{args.json} does not exist; run: python -m benchmarks.emoji.tables")
        fine_tunes = read(args.fine_tunes) if args.fine_tunes.is_file() else None
        write_report(read(args.json), args.cache, args.docs, fine_tunes, args.text_only)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

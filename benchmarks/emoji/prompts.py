"""Write ``calibration/emoji-prompts.txt``: training captions for distillation, without held-out concepts."""

from __future__ import annotations

from pathlib import Path

from .data import BASE_STYLES, caption, split


def lines() -> list[str]:
    """Each concept in both base styles; every fourth also without a style, with an article."""
    out = []
    for i, concept in enumerate(split()["train"]):
        out += [caption(concept, s.word) for s in BASE_STYLES]
        if i % 4 == 0:
            plain = caption(concept)
            out.append(("an " if plain[0] in "aeiou" else "a ") + plain)
    return out


if __name__ == "__main__":
    Path("calibration/emoji-prompts.txt").write_text("\n".join(lines()) + "\n")

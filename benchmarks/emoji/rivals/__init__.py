"""Rivals of the guides at an equal budget: other ways to put classifier-free guidance into one evaluation.

All of them are trained on the same states for the same number of optimizer steps, and none changes the base's weights.
Each is then used in the fine-tunes without further training.  Run ``python -m benchmarks.emoji.rivals train`` (minutes
on a GPU), ``measure``, ``report``.  To add a rival, register a subclass of :class:`~.base.Rival` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pnp_trt.registry import Registry

from .base import Rival

_HERE = __name__
RIVALS: Registry[type[Rival]] = Registry(
    "emoji_rivals",
    "rival",
    {
        "tiny": f"{_HERE}.guides:TinyRival",
        "w-embedding": f"{_HERE}.embedding:WEmbedding",
        "sharpener": f"{_HERE}.sharpener:Sharpened",
        "adapters": f"{_HERE}.adapters:AttentionAdapters",
        "additive": f"{_HERE}.adapters:AdditiveAdapters",
        "tiny+sharpener": f"{_HERE}.guides:TinyAndSharpener",
        "tiny+offsets": f"{_HERE}.guides:TinyAndOffsets",
        "tiny+sharpener+offsets": f"{_HERE}.guides:TinySharpenerAndOffsets",
        "full": f"{_HERE}.guides:FullRival",
    },
)


@dataclass(frozen=True)
class Page:
    """A page that ``report`` writes.

    Attributes:
        title: its first heading.
        record, document: the JSON and the page.
        options: the command's options for it.
        note: sentence on the learning rates.
    """

    title: str
    record: Path
    document: Path
    options: str = ""
    note: str = ""


PAGE = Page("Rivals at an equal budget", Path("benchmarks/results/emoji-rivals.json"), Path("docs/rivals.md"))
JOINT = Page(
    "Parts trained jointly", Path("benchmarks/results/emoji-joint.json"), Path("docs/joint-parts.md"), " --joint",
    " They are those that the pilot of [rivals](rivals.md) chose for the tiny guide, the sharpener and the additive "
    "adapters; combinations have the tiny guide's. Trainings ran beside other work, so the times of their steps cannot "
    "be compared.",
)  # fmt: skip

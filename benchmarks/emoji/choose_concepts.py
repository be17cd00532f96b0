"""Write ``concepts.json``, the split into training and held-out concepts.

Run once (``python -m benchmarks.emoji.choose_concepts``); the file is in the repository so that the split does not
change.  Concepts are those that all four styles include, from subject groups (Unicode's CLDR sub-groups, read from the
openmoji package) whose images show things rather than signs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tarfile
from pathlib import Path

from .data import BASE_STYLES, FINE_TUNE_STYLES, HERE, _npm_pack, icons

SUBGROUPS = (
    "animal-", "plant-", "food-", "drink", "dishware", "sky-weather", "heart",
    "geometric", "transport-air", "transport-ground",
    "transport-water",
    "game", "event", "sport", "award-medal", "arts-crafts", "musical-instrument", "clothing", "face-costume",
    "tool", "light-video", "lock", "place-building", "place-geographic", "face-smiling", "cat-face",
)  # fmt: skip
#: signs, near-duplicates, and images that are unrecognisable at 64 pixels
DROP = re.compile(
    r"medium|small|large-square|button|diamond-with|triangle-pointed|moon-face|waxing|waning|quarter-moon|oncoming|"
    r"lightning-and|behind-(large|small|rain)|arrival|departure|1st|2nd|3rd|-suit|bus-stop|construction|railway-track|"
    r"japanese|tokyo|love-hotel|wedding|liberty|guide-dog|service-dog|mahjong|flower-playing|carp-streamer|moon-viewing|"
    r"pine-dec|tanabata|admission|reminder|military|martial|heart-(dec|excl|with)|love-letter|revolving|beating|growing|"
    r"womans-clothes|prayer|rescue|motorway|cableway|tramway|suspension|monorail|mountain-railway|high-speed|"
    r"light-rail|tram-car|railway-car|mobility|wheelchair|seat|horizontal-traffic|fuel|oil-drum|"
    r"beaming|squinting|rolling-on|grinning-face-with|slightly|winking|melting|upside|with-tears|wry|kissing|pouting|"
    r"weary|crying|tilted-right|clapper|film|videocassette|locked-with|white-cane|hammer-and|broken-chain|fog|"
    r"brick|rock|wood|national|derelict|department|hindu"
)
COLOUR_SHAPE = (
    "blue-square",
    "green-circle",
    "orange-heart",
    "purple-square",
    "yellow-heart",
    "brown-circle",
    "green-square",
    "red-circle",
)


def _groups(cache: Path) -> dict[str, str]:
    with tarfile.open(_npm_pack("openmoji@17.0.0", cache / "npm")) as archive:
        member = archive.extractfile("package/data/openmoji.json")
        assert member is not None
        rows = json.load(member)

    def slug(text: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", re.sub("[’'“”]", "", text.lower())).strip("-")

    return {slug(r["annotation"]): r["subgroups"] for r in rows if not r["skintone"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--held-out", type=int, default=48)
    args = parser.parse_args()
    groups = _groups(args.cache)
    common = set.intersection(*(set(icons(s, args.cache)) for s in (*BASE_STYLES, *FINE_TUNE_STYLES)))
    pool = sorted(c for c in common if groups.get(c, "?").startswith(SUBGROUPS) and not DROP.search(c))
    rest = [c for c in pool if c not in COLOUR_SHAPE]
    held_out = sorted(
        random.Random(0).sample([c for c in rest if not re.search("heart|circle|square", c)], args.held_out)
    )
    train = [c for c in rest if c not in held_out]
    splits = {"train": train, "held_out": held_out, "held_out_colour_shape": list(COLOUR_SHAPE)}
    (HERE / "concepts.json").write_text(json.dumps({"seed": 0, "splits": splits}, indent=1) + "\n")
    print({k: len(v) for k, v in splits.items()})


if __name__ == "__main__":
    main()

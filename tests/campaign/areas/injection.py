"""Text that a page, template or formula could interpret, in prompts and engine names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from ..case import GUIDED, HERE, PLAIN, Case, Outcome, Place, Surroundings
from .common import PROMPTS, bench, engine_named, plug, sample, share, visualize, with_prompts

AREA = "injection"
TEXTS: dict[str, str] = {
    "a script": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "a template": "{{7*7}}{% raw %}",
    "a broken formula": "$\\frac$ $x^{$",
    "two prices": "a $5 coin and a $10 note",
    "percent signs": "100%s %(x)s",
    "markup": "[red]x[/nope]",
    "the end of an SVG": "]]></svg><script>1</script>",
    "quotes": '"\'><b onclick="alert(1)">',
    "a comment": "--><!-- x",
    "a JavaScript link": "javascript:alert(1)",
    "the end of a style": "</style><script>1</script>",
}
PAGE = HERE / "page.html"
UNSAFE = re.compile(r"<script>(alert|1)|<img src=x|<b onclick|</svg><script|</style><script>1")


def _escaped(outcome: Outcome, place: Place) -> str | None:
    page = place.path(PAGE)
    if not page.exists():
        return "no page was written"
    match = UNSAFE.search(page.read_text())
    return f"unescaped in the page: {match.group()}" if match else None


def _prompts(text: str) -> Callable[[Place], None]:
    return lambda place: _ignore(place.path(PROMPTS).write_text(f"{text}\n{text} two\na cat\n"))


def _ignore(_: object) -> None:
    return None


def _on_engine(
    command: str, words: Sequence[object], label: str, text: str,
    check: Callable[[Outcome, Place], str | None] | None = None, slow: bool = False,
) -> Case:  # fmt: skip
    """A command on an engine named ``text``."""
    return Case(
        AREA, f"{command}, an engine called {label}", words, (0,), with_prompts(engine_named(text)), check,
        surroundings=Surroundings(environment={"PNP_TRT_ENGINES": "engines"}), slow=slow,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases."""
    everything = ("--json", HERE / "x.json", "--html", PAGE, "--grid", HERE / "x.png", "--prompts", PROMPTS)
    for turn, (label, text) in enumerate(TEXTS.items()):
        yield Case(AREA, f"bench, prompts of {label}", bench(*everything), (0,), _prompts(text), _escaped, slow=True)
        if turn % 2:
            yield Case(AREA, f"visualize, a prompt of {label}", visualize(prompt=text), (0,), slow=True)
        yield Case(
            AREA, f"sample --grid, a prompt of {label}", sample(GUIDED, "--grid", HERE / "g.png", prompt=text), (0,)
        )
        name = text.replace("/", "∕")
        engine = HERE / "engines" / name
        quick = {"inspect": ("inspect", engine), "sample": sample(engine), "verify": ("verify", engine)}
        for command, words in share({**quick, "list": ("list",)}, turn, 1).items():
            yield _on_engine(command, words, label, text)
        engines = (PLAIN, engine)
        pages = {
            "plug": plug(engine),
            "bench": bench(*everything, engines=engines),
            "bench latency": bench("--batch", 1, "--rounds", 2, "--cold-starts", 0, "--html", PAGE, engines=engines,
                                   only="latency"),
        }  # fmt: skip
        for command, words in share(pages, turn, 1).items():
            check = None if command == "plug" else _escaped
            yield _on_engine(command, words, label, text, check, slow=True)

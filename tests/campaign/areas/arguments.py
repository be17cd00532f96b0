"""Numbers, sizes, profiles and words that options refuse, or accept only by chance."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import BASE, GUIDED, Case
from .common import ANY, bench, build, guidance, sample, some, steps, visualize, with_prompts, without

AREA = "arguments"
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-0",
    "1e308",
    "-1",
    "0",
    "99999999999999999999",
    "abc",
    "",
    "٣",
    "1_0",
    "0x10",
    " 3",
    "1e-400",
    "-9223372036854775809",
)
FEWER = ("nan", "inf", "-1", "0", "99999999999999999999", "٣")
COMMANDS: dict[str, tuple[tuple[object, ...], tuple[str, ...], tuple[str, ...]]] = {
    "sample": (sample()[:-2], ("--steps", "--guidance", "--seed", "-n", "--strength"), NUMBERS),
    "visualize": (visualize()[:-2], ("--guidance", "--steps", "--seed", "--show", "--layers"), FEWER),
    "build": (build(), ("--workspace",), FEWER),
    "guidance": (
        guidance(),
        (
            "--num-states",
            "--negative",
            "--rank",
            "--steps",
            "--batch",
            "--accumulate",
            "--lr",
            "--warmup",
            "--ema",
            "--w-min",
            "--w-max",
            "--feature-matching",
            "--checkpoint-every",
            "--keep",
            "--images",
            "--seed",
        ),
        FEWER,
    ),
    "steps": (
        steps(),
        (
            "--to",
            "--from",
            "--trajectories",
            "--lr",
            "--w-min",
            "--w-max",
            "--seed",
            "--ema",
            "--batch",
            "--accumulate",
        ),
        FEWER,
    ),
    "bench": (
        bench(),
        ("--batch", "--steps", "--timed-steps", "--rounds", "--guidance", "--images", "--cold-starts"),
        FEWER,
    ),
    "verify": (("verify", GUIDED, "--layers"), ("--worst",), FEWER),
}
SIZES = (
    "0x0", "7x7", "65x64", "1000000000x64", "-8x8", "64", "axb", "64x", "６４x６４", "1e3x1e3", "64x64x64", "", "x",
    "99999999999999999999x8",
)  # fmt: skip
PROFILES = (
    "b0",
    "b-1",
    "b1000000",
    "b2-1",
    "b",
    "",
    "b1@",
    "b1-8@64-32",
    "b٣",
    "b1@0",
    "b1@axb",
    "b1@99999999999",
    "🧑",
)
WORDS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "sample": (sample()[:-2], ("--method", "--schedule", "--format", "--metadata", "--provider", "--negative")),
    "build": (build(), ("--backend", "--precision", "--target", "--guide", "--base", "--calibration")),
    "guidance": (
        guidance(),
        ("--guide", "--states", "--schedule", "--mixed-precision", "--w-distribution", "--weighting", "--option"),
    ),
    "steps": (steps(), ("--guide", "--schedule", "--mixed-precision", "--weighting")),
    "bench": (
        bench(),
        ("--only", "--suite", "--schedule", "--provider", "--real", "--inception", "--clip", "--compare", "--engine"),
    ),
    "visualize": (visualize()[:-2], ("--guide", "--base", "--layers")),
}
STRANGE = ("", "nonsense", "../../etc/passwd", "\x1b[31m")
#: Options that accept any text, or are checked only later in the run.
TAKES_TEXT = {"--negative"}


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _numbers()
    yield from _words()
    yield from _shapes()
    yield from _missing()


def _numbers() -> Iterator[Case]:
    turn = 0
    for command, (words, options, values) in COMMANDS.items():
        prompt = ("--", "a cat") if command in ("sample", "visualize") else ()
        for option in options:
            turn += 1
            for value in some(values, turn, len(values) // 3):
                word = f"{option}={value}" if option != "-n" else f"-n{value}"
                yield Case(AREA, f"{command} {option} {value!r}", (*without(words, option), word, *prompt), ANY,
                           with_prompts(), slow=command not in ("sample", "verify"))  # fmt: skip


def _words() -> Iterator[Case]:
    turn = 0
    for command, (words, options) in WORDS.items():
        prompt = ("--", "a cat") if command in ("sample", "visualize") else ()
        for option in options:
            turn += 1
            for value in some(STRANGE, turn, 2):
                arguments = (*without(words, option), option, value, *prompt)
                allowed = ANY if option in TAKES_TEXT or value == "" else (2,)
                yield Case(
                    AREA, f"{command} {option} is {value!r}", arguments, allowed, with_prompts(), slow=value == ""
                )


def _shapes() -> Iterator[Case]:
    for turn, size in enumerate(SIZES):
        yield Case(AREA, f"sample --size {size!r}", sample(GUIDED, "--size", size))
        if turn % 2:
            yield Case(AREA, f"bench --size {size!r}", bench("--size", size))
        else:
            yield Case(AREA, f"build --profile b1@{size!r}", build("--profile", f"b1@{size}"), slow=True)
    for profile in PROFILES:
        yield Case(AREA, f"build --profile {profile!r}", build("--profile", profile), ANY, slow=True)


def _missing() -> Iterator[Case]:
    for words in (
        ("sample",),
        ("plug",),
        ("plug", GUIDED),
        ("plug", GUIDED, GUIDED),
        ("inspect",),
        ("verify",),
        ("compare",),
        ("compare", BASE, BASE),
        ("distill", "guidance"),
        ("distill", "steps"),
        ("visualize",),
        ("nonsense",),
        ("--nonsense",),
        ("distill", "nonsense"),
        ("sample", "a", "--nonsense"),
        ("list", "nonsense"),
        ("doctor", "nonsense"),
        ("inspect", ""),
        ("sample", "a", "--engine", ""),
        ("plug", "", "--base", BASE),
        ("verify", "\n"),
        ("inspect", "x" * 5000),
        ("sample", "a", "--engine", "x" * 5000),
        ("sample", "a", "--engine", "a/" * 3000),
        ("build", "--base", "x" * 5000),
        ("plug", GUIDED, "--base", "x" * 5000),
        ("plug", GUIDED, "--lora", "x" * 5000),
    ):
        yield Case(AREA, " ".join(str(w)[:20] for w in words) or "nothing", words, (1, 2))
    for words in (
        ("--help",),
        ("-h",),
        ("--version",),
        ("sample", "--help"),
        ("distill", "--help"),
        ("bench", "--help"),
    ):
        yield Case(AREA, " ".join(words), words, (0,))

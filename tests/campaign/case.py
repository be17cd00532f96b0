"""A case of the campaign: a command, its environment, its conditions, and the classification of its outcome."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pnp_trt.bundle.store import sha256

CLASSES = ("OK", "UNEXPECTED", "TRACEBACK", "WRONG-CODE", "HANG", "CRASH", "SILENT", "FAULT")
#: Terminal control characters: C0 without tab and line ends, C1, and the marks that change the direction of text.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
#: Control sequences that rich itself sends to a terminal: colours, cursor movements, erased lines, a hidden cursor.
RICH = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhlmnsu]")
#: Folders beside the fixtures that replace the system's and the user's, and the folder of shared exports.
SYSTEM = ("tmp", "home", "cache", "traces")
LONGEST = 20_000  # characters on standard error; hostile input must not flood the screen


@dataclass(frozen=True)
class At:
    """A path below one of a place's folders, resolved when the case runs."""

    root: str
    path: str = ""

    def __truediv__(self, name: str) -> At:
        return At(self.root, f"{self.path}/{name}" if self.path else name)

    def __add__(self, suffix: str) -> At:
        return At(self.root, self.path + suffix)


HERE, BASE, BASE2, GUIDE, ENGINES = (At(name) for name in ("here", "base", "base2", "guide", "engines"))
PLAIN, GUIDED = ENGINES / "plain", ENGINES / "guided"


@dataclass(frozen=True)
class Place:
    """The folders of a case: its own, and the fixtures, which it must not change."""

    here: Path
    fixtures: Path

    def path(self, at: At) -> Path:
        """Return the path of ``at``."""
        root = self.here if at.root == "here" else self.fixtures / at.root
        return Path(f"{root}/{at.path}") if at.path else root

    def words(self, arguments: tuple[object, ...]) -> list[str]:
        """Return the words of a command line, with every ``At`` replaced by its path, not normalised."""
        return [str(self.path(a)) if isinstance(a, At) else str(a) for a in arguments]


@dataclass(frozen=True)
class Surroundings:
    """The environment of a process, apart from its command line.

    Attributes:
        environment: variables to set, or to remove if the value is None.
        stdin: bytes, or a file; default /dev/null.
        limits: pairs of a ``resource.RLIMIT_…`` and its value.
        before: called in the child process after the rest of the set-up.
        terminal: whether the three standard streams are a pseudo-terminal.
        fresh: use a new interpreter instead of a fork of the zygote.
        cpu, wall: seconds after which the case counts as hung.
    """

    environment: Mapping[str, str | None] = field(default_factory=dict)
    cwd: At | None = None
    stdin: bytes | At | None = None
    limits: tuple[tuple[int, int], ...] = ()
    before: Callable[[Place], None] | None = None
    terminal: bool = False
    fresh: bool = False
    cpu: float = 60
    wall: float = 400


@dataclass(frozen=True)
class Outcome:
    """The result of a command; ``code`` is negative for a signal."""

    code: int
    out: str
    err: str
    cpu: float = 0.0
    wall: float = 0.0
    hung: bool = False
    events: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """Everything that was printed."""
        return self.out + self.err

    def of(self, kind: str) -> list[str]:
        """Return the audit's entries of one kind: ``write``, ``lookup`` or ``program``."""
        return [e[len(kind) + 1 :] for e in self.events if e.startswith(f"{kind} ")]


Check = Callable[[Outcome, Place], str | None]


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        arguments: the command line; ``At`` stands for a path.
        allowed: permitted exit codes, including 0 if the input may be accepted.
        prepare: creates the hostile input in ``place.here``.
        check: returns a sentence that describes the failure, or None.
        says: a pattern that the output must match.
        slow: only in the full campaign.
        disk: whether the message may mention disk space.
        network: whether network access is permitted.
        scenario: function to call instead of running ``arguments`` once.
    """

    area: str
    name: str
    arguments: tuple[object, ...] = ()
    allowed: tuple[int, ...] = (1, 2)
    prepare: Callable[[Place], object] | None = None
    check: Check | None = None
    says: str = ""
    slow: bool = False
    disk: bool = False
    network: bool = False
    surroundings: Surroundings = Surroundings()
    scenario: Callable[[Place], tuple[Outcome, str | None]] | None = None

    @property
    def light(self) -> bool:
        """Whether the case ends before any network runs: its input must be refused, or its command runs no network."""
        return self.scenario is None and (0 not in self.allowed or self.arguments[0] in ("inspect", "list", "doctor"))


def precious(folder: Path) -> dict[str, str]:
    """Digests of the user's files below ``folder``, which are named ``*precious*``."""
    return {str(p): sha256(p) for p in folder.rglob("*precious*") if p.is_file() and not p.is_symlink()}


def signature(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files below ``folder``."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def litter(folder: Path) -> list[str]:
    """Temporary files that a finished command left behind; lock files are meant to stay."""
    marks = (".partial-", ".part")
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if any(m in p.name for m in marks) and not p.name.endswith((".lock", ".json.partial"))
    )


def classify(case: Case, outcome: Outcome, place: Place) -> tuple[str, str]:
    """Return the class of an outcome, and a description of the fault."""
    output, code = outcome.said, outcome.code
    if outcome.hung:
        return "HANG", f"{outcome.cpu:.0f} s of CPU, {outcome.wall:.0f} s in all"
    if "Traceback (most recent call last)" in output:
        return "TRACEBACK", output.strip().splitlines()[-1]
    if match := re.search(r"pnp-trt: unexpected \w+.*", output):
        return "UNEXPECTED", match.group()
    if code not in case.allowed:
        return ("CRASH", signal.Signals(-code).name) if code < 0 else ("WRONG-CODE", f"{code}, not {case.allowed}")
    # on a terminal, rich's cursor control precedes the sentence
    plain = RICH.sub("", output).replace("\r", "\n")
    if code in (1, 2) and not re.search(r"^pnp-trt: |^Usage: |Error|off by|missing", plain, re.MULTILINE):
        return "SILENT", f"exit code {code} and no sentence"
    if fault := _fault(case, outcome, place):
        return "FAULT", fault
    return "OK", ""


def _fault(case: Case, outcome: Outcome, place: Place) -> str | None:
    output = RICH.sub("", outcome.said).replace("\r\n", "\n") if case.surroundings.terminal else outcome.said
    if raw := CONTROL.search(output):
        return f"a control character, {raw.group()!r}, is printed"
    if len(outcome.err) > LONGEST:
        return f"{len(outcome.err):,} characters on standard error"
    if not case.network and (hosts := outcome.of("lookup")):
        return f"the network was requested {', '.join(sorted(set(hosts)))}"
    if outside := _outside(outcome, place):
        return f"written outside: {', '.join(outside[:3])}"
    if re.search("free some space|disk is full", outcome.err) and not (case.disk or "No space" in outcome.err):
        return "a disk that is full is blamed, and none is"
    if outcome.code in (1, 2) and (left := litter(place.here)):
        return f"left behind: {', '.join(left[:3])}"
    if case.says and not re.search(case.says, outcome.said):
        return f"'{case.says}' is not said"
    return case.check(outcome, place) if case.check else None


def _outside(outcome: Outcome, place: Place) -> list[str]:
    """Files that the command changed outside the case's folder and the system folders."""
    allowed = [place.here.resolve(), *(place.fixtures.resolve().parent / name for name in SYSTEM)]
    writes = {Path(w) for w in outcome.of("write") if "__pycache__" not in w}
    return sorted(str(w) for w in writes if not any(w.is_relative_to(folder) for folder in allowed))


def row(case: Case, outcome: Outcome, kind: str, detail: str, place: Place) -> dict[str, Any]:
    """Return a row of the report."""
    return {
        "area": case.area, "name": case.name, "class": kind, "detail": _printable(detail)[:300], "code": outcome.code,
        "cpu_seconds": round(outcome.cpu, 2), "arguments": [_printable(w)[:160] for w in place.words(case.arguments)],
        "said": _printable(outcome.err.strip())[-500:], "out": _printable(outcome.out.strip())[-200:],
    }  # fmt: skip


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()

"""Parse untrusted JSON within bounds and check each value; errors name file, key and value."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import BundleCorrupt, InputError
from ..io.text import printable

#: limits of nesting, digits of a whole number, characters of a string, and members of one list or object
MAX_DEPTH, MAX_DIGITS, MAX_TEXT, MAX_MEMBERS = 16, 18, 16_384, 50_000
MISSING: Any = object()


def read_json(path: Path, advice: str, *, limit: int, members: int = MAX_MEMBERS) -> Any:
    """Read a JSON file with no duplicate keys, no NaN, and within the bounds of this module.

    Args:
        advice: what to do about a refused file; the end of the error message.
        limit: largest size of the file in bytes.
        members: largest number of members of a list or object.

    Raises:
        InputError: if it is missing, is not a regular file, is too large, is not JSON, or is out of bounds.
    """
    return parse_file(path, read_regular(path, advice, limit=limit), advice, members=members)


def parse_file(path: Path, raw: bytes, advice: str, *, members: int = MAX_MEMBERS) -> Any:
    """Parse the contents of a file; same as ``read_json`` otherwise."""
    try:
        return parse(raw, members=members)
    except UnicodeDecodeError as e:
        raise BundleCorrupt(f"{path} is not readable as JSON (byte {e.start} is not UTF-8); {advice}") from None
    except (ValueError, RecursionError) as e:
        raise BundleCorrupt(f"{path} is not readable as JSON ({_reason(e)}); {advice}") from None


def read_regular(path: Path, advice: str, *, limit: int) -> bytes:
    """Read a regular file that is not a link.

    Raises:
        InputError: if it is missing, a link, a device or a pipe, cannot be read, or has more than ``limit`` bytes.
    """
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise BundleCorrupt(f"{path} is a link; copy the file itself, for example with cp -rL")
        if not stat.S_ISREG(status.st_mode):
            raise BundleCorrupt(f"{path} is not a regular file; {advice}")
        if status.st_size > limit:
            raise BundleCorrupt(f"{path} has {status.st_size} bytes; it must have at most {limit}; {advice}")
        with path.open("rb") as f:
            return f.read(limit + 1)
    except FileNotFoundError:
        raise BundleCorrupt(f"{path} is missing; {advice}") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror or e}); check its permissions") from None


def parse(raw: bytes, *, members: int = MAX_MEMBERS) -> Any:
    """Parse UTF-8 JSON within bounds; raise ``ValueError`` or ``RecursionError``."""
    value = json.loads(
        raw.decode(),
        object_pairs_hook=_unique,
        parse_constant=_no_constant,
        parse_int=_parse_integer,
        parse_float=_finite,
    )
    check_bounds(value, members=members)
    return value


def check_bounds(value: Any, *, members: int = MAX_MEMBERS) -> None:
    """Raise ``ValueError`` for a JSON value that is nested too deeply, too long, or has invalid text."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, Mapping | list | tuple):
                if len(item) > members:
                    raise ValueError(f"a list or object has {len(item)} members, more than {members}")
                if isinstance(item, Mapping):
                    below += item
                    below += item.values()
                else:
                    below += item
            else:
                _check_scalar(item)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise ValueError(f"a string has {len(text)} characters, more than {MAX_TEXT}")
    if "\0" in text:
        raise ValueError("a string contains a null character")
    try:
        # accept undecodable bytes of a file name, but no other surrogates, independently of the locale's encoding
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("a string contains a lone surrogate") from None


def _check_scalar(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    elif not isinstance(value, float):
        raise ValueError(f"a {type(value).__name__} is not JSON")
    elif not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key '{printable(key, limit=60)}' occurs twice")
        out[key] = value
    return out


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:
        raise ValueError(f"a number has {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    if len(text) > 60 or abs(value := float(text)) == float("inf"):
        raise ValueError(f"the number {text[:30]} is out of range")
    return value


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else printable(error, limit=200)


@dataclass(frozen=True)
class Value:
    """One value of a document, with its full key and its file.

    Every method checks and converts the value, and raises ``InputError`` with file, key, value and advice.
    """

    raw: Any
    key: str
    file: str
    advice: str

    def refuse(self, rule: str) -> InputError:
        """The error for a value that violates ``rule``, such as ``must be text``."""
        if self.raw is MISSING:
            return InputError(f"{self.file}: {printable(self.key, limit=200)} is missing; {self.advice}")
        return InputError(
            f"{self.file}: {printable(self.key, limit=200)} is {_shown(self.raw)}; it {rule}; {self.advice}"
        )

    def text(self, *, longest: int = 4096, shortest: int = 0, pattern: re.Pattern[str] | None = None,
             form: str = "", known: Iterable[str] | None = None) -> str:  # fmt: skip
        """A string of legal length that matches ``pattern`` (``form`` in words) and is one of ``known``."""
        value = self.raw
        if not isinstance(value, str):
            raise self.refuse("must be text")
        if not shortest <= len(value) <= longest:
            raise self.refuse(f"must have {shortest} to {longest} characters")
        if pattern is not None and pattern.fullmatch(value) is None:
            raise self.refuse(f"must be {form}")
        if known is not None and value not in (choices := tuple(known)):
            raise self.refuse(f"must be one of: {', '.join(choices)}")
        return value

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        if isinstance(self.raw, bool) or not isinstance(self.raw, int) or not low <= self.raw <= high:
            raise self.refuse(f"must be a whole number from {low} to {high}")
        return self.raw

    def number(self, low: float, high: float) -> Any:
        """A number from ``low`` to ``high``, integer or float as in the document."""
        value = self.raw
        if (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):  # also refuses NaN
            raise self.refuse(f"must be a number from {low:g} to {high:g}")
        return value

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.raw, bool):
            raise self.refuse("must be true or false")
        return self.raw

    def items(self, shortest: int = 0, longest: int = 1000) -> list[Value]:
        """The members of a list."""
        if not isinstance(self.raw, list | tuple):
            raise self.refuse("must be a list")
        if not shortest <= len(self.raw) <= longest:
            raise self.refuse(f"must have {shortest} to {longest} members")
        return [Value(v, f"{self.key}[{i}]", self.file, self.advice) for i, v in enumerate(self.raw)]

    def entries(self, longest: int = 1000, *, longest_key: int = 1024) -> dict[str, Value]:
        """The members of an object with arbitrary keys."""
        if not isinstance(self.raw, Mapping) or not all(isinstance(k, str) for k in self.raw):
            raise self.refuse("must be an object")
        if len(self.raw) > longest:
            raise self.refuse(f"must have at most {longest} members")
        if long := [k for k in self.raw if len(k) > longest_key]:
            raise self.refuse(f"must have keys of at most {longest_key} characters, not {len(long[0])}")
        return {k: self._member(k, v) for k, v in self.raw.items()}

    def members(self, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Value]:
        """The members of an object that has all required keys, and no others besides optional ones."""
        entries, needed = self.entries(), tuple(required)
        known = (*needed, *optional)
        if missing := [k for k in needed if k not in entries]:
            raise BundleCorrupt(
                f"{self.file} lacks {', '.join(self._member(k, None).key for k in missing)}; {self.advice}"
            )
        if unknown := [v for k, v in entries.items() if k not in known]:
            where = printable(unknown[0].key, limit=200)
            raise BundleCorrupt(f"{self.file}: {where} is {_shown(unknown[0].raw)}; this key is unknown; {self.advice}")
        return entries

    def member(self, key: str) -> Value:
        """One member of an object; its value is ``MISSING`` if the object lacks it."""
        return self.entries(MAX_MEMBERS, longest_key=MAX_TEXT).get(key) or self._member(key, MISSING)

    def nullable(self, convert: Callable[[Value], Any]) -> Any:
        """None for null, otherwise the result of ``convert``."""
        return None if self.raw is None else convert(self)

    def _member(self, key: str, value: Any) -> Value:
        return Value(value, f"{self.key}.{key}" if self.key else key, self.file, self.advice)


def check_sizes(value: Value) -> None:
    """Refuse implausible numbers in a config, at any depth."""
    if isinstance(value.raw, int | float) and not isinstance(value.raw, bool):
        value.number(-1e6, 1e6)
    elif isinstance(value.raw, list):
        for item in value.items(0, 1000):
            check_sizes(item)
    elif isinstance(value.raw, Mapping):
        for item in value.entries().values():
            check_sizes(item)


def _shown(raw: Any) -> str:
    """A short form of a value on one line, for messages."""
    if isinstance(raw, Mapping):
        return f"an object of {len(raw)} members"
    if isinstance(raw, list | tuple):
        return f"a list of {len(raw)} members"
    if isinstance(raw, str):
        return f"'{printable(raw, limit=80)}'"
    if raw is None or isinstance(raw, bool):
        return json.dumps(raw)
    return printable(raw, limit=40) if not isinstance(raw, int) or abs(raw) < 10**30 else "a very large number"

"""Make untrusted text safe to print: names, prompts and manifests may contain control characters and markup."""

from __future__ import annotations

import unicodedata
from typing import Any

#: format characters that ordinary words and emoji need: the zero-width non-joiner and the zero-width joiner
_HARMLESS = "\u200c\u200d"
#: controls (C0, C1), format characters (bidirectional overrides, tags), surrogates, line and paragraph separators
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(value: Any, *, limit: int | None = None, keep: str = "") -> str:
    """Return ``str(value)`` with every character that could control a terminal escaped, such as ``\\x1b``.

    Args:
        limit: maximum length of the result; a longer result is cut and ends in ``…``.
        keep: characters that are not escaped, such as a newline.
    """
    text = str(value)
    if limit is None:
        return _escape(text, keep)
    shown = _escape(text[: limit + 1], keep)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def printable_json(text: str) -> str:
    """Return JSON text of ``json.dumps`` with DEL escaped, the only control character that it does not escape."""
    return text.replace("\x7f", "\\u007f")


def _escape(text: str, keep: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _steers(c) else _escaped(c) for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _UNPRINTABLE and character not in _HARMLESS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

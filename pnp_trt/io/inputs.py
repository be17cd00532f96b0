"""Read text from users: files, standard input and prompts.

Every text input goes through this module, so that a byte order mark, Windows line endings or another encoding never
become part of a prompt or a key.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

#: maximum bytes of a text input; an endless device must not fill the memory
MAX_BYTES = 256 << 20
#: maximum characters of a prompt; a text encoder reads 77 tokens, the rest is only tokenised
MAX_PROMPT = 1_000_000
#: maximum first seed of a run, which leaves room to count up from it
MAX_SEED = 2**62
#: maximum characters of a prompt in a message
EXCERPT = 60
#: UTF-32 before UTF-16, because the mark of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BYTE_ORDER_MARK = "\ufeff"
_NEWLINE = re.compile(r"\r\n|\r|\n")
#: prompt syntax of other programs that is not interpreted here
_WEIGHTS = r"""
      \( [^()]+ : \s* [0-9]*\.?[0-9]+ \s* \)            # (red:1.5)
    | \(\( [^()]+ \)\)                                  # ((red))
"""
_TAGS = r"""
      < (?: lora | lyco | hypernet ) : [^<>]+ >         # <lora:sepia:1>
    | \[ [^\[\]]* : [^\[\]]* : \s* [0-9]*\.?[0-9]+ \s* \]  # [cat:dog:0.5]
"""
_OTHERS = rf"{_TAGS} | \b BREAK \b"
_SYNTAX = re.compile(f"{_WEIGHTS}|{_OTHERS}", re.VERBOSE)
_OTHER_SYNTAX = re.compile(_OTHERS, re.VERBOSE)
_EDITING = re.compile(_TAGS, re.VERBOSE)


def read_text(path: Path, what: str = "", advice: str = "give a text file") -> str:
    """Read a text file in UTF-8, or in the encoding of its byte order mark, and remove the mark.

    Args:
        what: the file's role, for messages, such as ``the prompts file``.
        advice: advice at the end of the message.

    Raises:
        InputError: if it is missing, unreadable, not text, or larger than ``MAX_BYTES``.
    """
    name = f"{what} {path}".strip()
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; {advice}") from None
    except (OSError, ValueError) as e:  # ValueError: a path with a NUL
        raise InputError(f"{name} cannot be read ({getattr(e, 'strerror', None) or e}); {advice}") from None
    return decode(data, name)


def is_file(path: Path) -> bool:
    """Whether a user-supplied path is a file; False if the system refuses the path."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for the system, or in a folder that cannot be searched
        return False


def is_folder(path: Path) -> bool:
    """Whether a user-supplied path is a folder; False if the system refuses the path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def decode(data: bytes, name: str) -> str:
    """Decode the bytes of a text input and remove the byte order mark.

    Args:
        name: the input's name, for messages.

    Raises:
        InputError: if it is too large or not text, with the line and the byte.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES >> 20} MiB; give a smaller text file")
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) if encoding == "utf-8" else 0 :].decode(encoding)
    except UnicodeDecodeError as e:
        before = e.object[: e.start]
        if encoding == "utf-8":
            line = len(_NEWLINE.findall(before.decode("utf-8"))) + 1
            place = f"line {line}, byte {e.start + len(mark)} is 0x{e.object[e.start]:02x}"
        else:
            place = f"byte {e.start}: {e.reason}"
        raise InputError(f"{name} is not {encoding.upper()} text ({place}); save it as UTF-8") from None
    if "\0" in text:
        line = len(_NEWLINE.findall(text[: text.index("\0")])) + 1
        raise InputError(f"{name} is not text (a NUL character in line {line}); save it as UTF-8 text")
    return text.lstrip(BYTE_ORDER_MARK)


def lines(text: str) -> list[str]:
    """Split a text into lines, and strip blanks and byte order marks (concatenated files have marks inside).

    Lines end with LF, CR LF or a single CR, as in editors.
    """
    return [line.strip().strip(BYTE_ORDER_MARK).strip() for line in _NEWLINE.split(text)]


def read_json(
    path: Path, what: str = "", advice: str = "give a complete JSON file", *, constants: bool = False
) -> Any:  # fmt: skip
    """Return the value of a JSON file; NaN and Infinity are refused by default.

    Args:
        constants: accept NaN and Infinity, which are not JSON but which Python writes.

    Raises:
        InputError: as in :func:`read_text`, or if the file is not JSON, with line and column.
    """
    return parse_json(read_text(path, what, advice), f"{what} {path}".strip(), advice, constants=constants)


def parse_json(text: str, name: str, advice: str, *, constants: bool = False) -> Any:
    """Return the value of a JSON text; ``name`` and ``advice`` are for messages, ``constants`` is as in ``read_json``.

    Raises:
        InputError: if it is not JSON, is nested too deeply, or contains NaN or Infinity.
    """
    try:
        return json.loads(text, parse_constant=float if constants else _no_constant)
    except json.JSONDecodeError as e:
        raise InputError(
            f"{name} is not complete JSON (line {e.lineno}, column {e.colno}: {e.msg}); {advice}"
        ) from None
    except RecursionError:
        raise InputError(f"{name} is nested too deeply; {advice}") from None
    except ValueError as e:  # a constant that is not JSON, or a number of thousands of digits
        raise InputError(f"{name} is not usable JSON ({e}); {advice}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not a JSON number")


def read_stdin_prompts() -> list[str]:
    """Return the non-blank lines of standard input.

    Raises:
        InputError: if standard input is closed, is blank, or is not text.
    """
    stream = sys.stdin
    if stream is None:
        raise InputError("standard input is closed; give prompts as arguments instead of -")
    try:
        raw = getattr(stream, "buffer", None)
        data = stream.read().encode("utf-8", "surrogateescape") if raw is None else raw.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:  # ValueError: closed
        raise InputError(f"standard input cannot be read ({e}); give prompts as arguments instead of -") from None
    prompts = [line for line in lines(decode(data, "standard input")) if line]
    if not prompts:
        raise InputError("standard input has no prompt; give one per line, or pass prompts as arguments instead of -")
    return prompts


def check_prompts(prompts: Iterable[str], what: str = "the prompt") -> None:
    """Raise ``InputError`` for a prompt that a tokenizer cannot read: not a string, not UTF-8, or far too long."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"{what} is {type(prompt).__name__}, not text; pass a string")
        if len(prompt) > MAX_PROMPT:
            raise InputError(f"{what} has {len(prompt):,} characters; at most {MAX_PROMPT:,} are allowed")
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            code = ord(prompt[e.start])
            # Python represents a byte of an argument that is not UTF-8 as U+DC00 plus the byte
            wrong = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the code U+{code:04X}"
            raise InputError(
                f"{what} is not UTF-8 text: {wrong} after {excerpt(prompt[: e.start])}; give it in UTF-8"
            ) from None


def as_utf8(argument: str) -> str:
    """Decode an argument as UTF-8 even if the locale's encoding is another, such as ASCII with LC_ALL=C."""
    try:
        return argument.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except UnicodeError:
        return argument


def check_seed(seed: int) -> None:
    """Raise ``InputError`` for a seed that the random generators of torch or numpy do not accept."""
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed is {seed}; it must be between 0 and {MAX_SEED}")


def warn_of_syntax(prompts: Sequence[str], *, weighted: bool = False, breaks: bool = False) -> None:
    """Warn once about weights, LoRA tags and keywords of other programs, which are read as plain words here.

    Args:
        weighted: whether weights in parentheses are interpreted.
        breaks: whether ``BREAK`` is interpreted, too.
    """
    syntax = _SYNTAX if not weighted else _EDITING if breaks else _OTHER_SYNTAX
    matches = (m for p in prompts if not p.isupper() for m in [syntax.search(p[:10_000])] if m is not None)
    if (match := next(matches, None)) is None:
        return
    if weighted and match[0] == "BREAK":
        warnings.warn(
            "BREAK in a prompt is read as a space: this engine's prompts have one chunk; for several chunks, build it "
            "with --tokens 154 or more",
            stacklevel=3,
        )
        return
    if weighted:
        warnings.warn(
            f"{excerpt(match[0])} in a prompt is not interpreted: prompt editing and <lora:…> tags are not supported; "
            "merge a LoRA with: pnp-trt plug ENGINE --lora FILE",
            stacklevel=3,
        )
        return
    advice = "; merge a LoRA with: pnp-trt plug ENGINE --lora FILE" if match[0].startswith("<") else ""
    warnings.warn(
        f"{excerpt(match[0])} in a prompt is read as plain words: weights in parentheses, <lora:…> tags and BREAK are "
        f"not interpreted{advice}",
        stacklevel=3,
    )


def excerpt(text: str, length: int = EXCERPT) -> str:
    """Return at most ``length`` characters of a text, in quotes and on one line, for a message."""
    return f"“{shortened(text, length)}”"


def shortened(text: str, length: int = EXCERPT) -> str:
    """Return at most the first ``length`` characters of a text, with unprintable characters escaped."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)

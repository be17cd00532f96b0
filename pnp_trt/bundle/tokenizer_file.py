"""Check a bundle's ``tokenizer.json``: only components of CLIP's tokenizer, whose time and output are bounded.

A tokenizer file is a small program.  Its normalizers can replace one letter by a million, and its regular expressions
can take exponential time; CLIP's do neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .document import Value, parse_file, read_regular

_LIMIT, _MEMBERS = 64 << 20, 500_000
_SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>|"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_NORMALIZERS: tuple[Any, ...] = (
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
)
_PATTERNS = ({"Regex": _WORDS}, {"Regex": _SPECIAL + _WORDS})
_TOP = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
        "model")  # fmt: skip


def read_tokenizer(path: Path, advice: str) -> bytes:
    """Read the bytes of a ``tokenizer.json`` without checking them.

    Raises:
        InputError: if it is not a regular file, or too large.
    """
    return read_regular(path, advice, limit=_LIMIT)


def check_tokenizer(path: Path, raw: bytes, vocabulary: int, advice: str) -> str:
    """Check a ``tokenizer.json`` and return its text.

    Args:
        path: the file, for messages.
        vocabulary: number of rows of the text encoder's embedding table.
        advice: what to do about a refused file; the end of the error message.

    Raises:
        InputError: if it has components other than those of CLIP's tokenizer, or ids outside the embedding table.
    """
    document = Value(parse_file(path, raw, advice, members=_MEMBERS), "", str(path), advice)
    m = document.members((), _TOP)
    _check_model(document.member("model"), vocabulary)
    _check_normalizer(document.member("normalizer"))
    _check_pre_tokenizer(document.member("pre_tokenizer"))
    _check_post_processor(document.member("post_processor"), vocabulary)
    for token in document.member("added_tokens").items(0, 10_000):
        token.member("id").integer(0, vocabulary - 1)
        token.member("content").text(longest=200, shortest=1)
        if token.member("normalized").raw not in (False, True):
            raise token.member("normalized").refuse("must be true or false")
    if "decoder" in m and m["decoder"].raw not in (None, {}):
        m["decoder"].member("type").text(known=("ByteLevel", "BPEDecoder"))
    return raw.decode()


def _check_model(model: Value, vocabulary: int) -> None:
    model.member("type").text(known=("BPE",))
    table = model.member("vocab").entries(_MEMBERS)
    if not table:
        raise model.member("vocab").refuse("must have members")
    for token in table.values():
        if type(token.raw) is not int or not 0 <= token.raw < vocabulary:
            token.integer(0, vocabulary - 1)
    model.member("merges").items(0, _MEMBERS)
    dropout = model.entries().get("dropout")
    if dropout is not None and dropout.raw not in (None, 0):
        raise dropout.refuse("must be null: with dropout, equal prompts would have different tokens")


def _check_normalizer(normalizer: Value) -> None:
    steps = normalizer.member("normalizers").items(0, 10) if _is(normalizer, "Sequence") else [normalizer]
    for step in steps:
        if step.raw not in _NORMALIZERS:
            raise step.refuse("must be one of the normalizers of CLIP's tokenizer: NFC, Replace (blanks), Lowercase")


def _check_pre_tokenizer(pre_tokenizer: Value) -> None:
    steps = pre_tokenizer.member("pretokenizers").items(1, 10) if _is(pre_tokenizer, "Sequence") else [pre_tokenizer]
    for step in steps:
        split = _is(step, "Split") and step.member("pattern").raw in _PATTERNS
        if not split and not _is(step, "ByteLevel"):
            raise step.refuse("must be one of the pre-tokenizers of CLIP's tokenizer: its Split by words, ByteLevel")


def _check_post_processor(processor: Value, vocabulary: int) -> None:
    """Check the component that adds start and end tokens to a prompt."""
    kind = processor.member("type").text(known=("RobertaProcessing", "TemplateProcessing"))
    if kind == "RobertaProcessing":
        for key in ("sep", "cls"):
            text, token = processor.member(key).items(2, 2)
            text.text(longest=200, shortest=1)
            token.integer(0, vocabulary - 1)
        return
    processor.member("single").items(3, 3)
    for token in processor.member("special_tokens").entries(10).values():
        for number in token.member("ids").items(1, 1):
            number.integer(0, vocabulary - 1)


def _is(value: Value, kind: str) -> bool:
    return isinstance(value.raw, dict) and value.raw.get("type") == kind

"""Prompts in AUTOMATIC1111's syntax: parts of more or less weight, and chunks of the text encoder's length.

=================  =========================================================
``(x)``            1.1 times the weight; nested ones multiply
``[x]``            the weight divided by 1.1
``(x:1.3)``        1.3 times the weight
``\\(``, ``\\]``     the bracket itself
``(x`` unclosed    counts to the end of the prompt
``BREAK``          what follows begins a new chunk
=================  =========================================================

``<lora:x:0.8>`` names a LoRA and its scale, 1 where none is stated (:func:`take_lora_tags`); servers take it.

A token's weight multiplies its text state; a chunk's states are then scaled back to the mean that they had, which is
A1111's emphasis "Original".  A prompt is cut into chunks of 75 tokens (:func:`cut_chunks`), each is encoded by itself
between a start and an end, and their states stand one after the other.  Prompt editing (``[a:b:0.5]``) is not
interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import InputError
from ..io.inputs import excerpt

PLAIN, A1111 = "plain", "a1111"
#: ways to read a prompt
SYNTAXES = (PLAIN, A1111)
#: of a bracket without a number
STEP = 1.1
#: weights beyond it say nothing: the states are scaled back to their mean
LARGEST = 100.0
#: below this share of their deviation a mean of states is chance, and they are not scaled by it
NO_MEAN = 0.01
_TOKEN = re.compile(r"\\[\\()\[\]]|[(\[)\]]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]")
#: tokens before the end of a full chunk among which a comma is where it ends (A1111's "comma padding backtrack")
BACKTRACK = 20
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_LORA = re.compile(r"<lora:([^<>]*)>")


def check_syntax(syntax: str) -> None:
    """Raise ``InputError`` for a syntax that is not one of ``SYNTAXES``."""
    if syntax not in SYNTAXES:
        raise InputError(f"the prompt syntax is '{syntax}'; known: {', '.join(SYNTAXES)}")


#: texts with their weights
Parts = list[tuple[str, float]]


def weighted_parts(prompt: str) -> list[Parts]:
    """A prompt's parts with their weights, those between two ``BREAK`` together; neighbours of one weight are joined.

    A ``BREAK`` inside brackets counts too, and the brackets go on behind it.

    Raises:
        InputError: for a weight beyond ±100.
    """
    texts: list[str | None] = []  # None stands for BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= by

    for match in _TOKEN.finditer(prompt):
        token = match[0]
        if token in opened:
            opened[token].append(len(texts))
        elif match["weight"] is not None and opened["("]:
            if not abs(weight := float(match["weight"])) <= LARGEST:
                raise InputError(f"the weight of {excerpt(prompt)} is {match['weight']}; give at most {LARGEST:g}")
            multiply(opened["("].pop(), weight)
        elif token == ")" and opened["("]:
            multiply(opened["("].pop(), STEP)
        elif token == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / STEP)
        else:
            found = [token[1]] if len(token) == 2 and token[0] == "\\" else _BREAK.split(token)
            for number, text in enumerate(found):
                texts += [text] if number == 0 else [None, text]
                weights += [1.0] if number == 0 else [1.0, 1.0]
    for start in opened["("]:
        multiply(start, STEP)
    for start in opened["["]:
        multiply(start, 1 / STEP)
    sections: list[Parts] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        parts = sections[-1]
        if text is None:
            sections.append([])
        elif parts and parts[-1][1] == weight:
            parts[-1] = parts[-1][0] + text, weight
        elif text:
            parts.append((text, weight))
    return sections


def without_breaks(prompt: str) -> str:
    """A prompt with a space in the place of each ``BREAK``."""
    return _BREAK.sub(" ", prompt)


def cut_chunks(sections: Sequence[Sequence[int]], length: int, comma: int | None) -> list[list[int]]:
    """A prompt's tokens in chunks of at most ``length``: the places of each chunk's tokens, counted through.

    A chunk ends at a ``BREAK``, or where it is full: behind its last comma, if at most 20 tokens follow it, else before
    the next token.  These are AUTOMATIC1111's rules (``modules/sd_hijack_clip.py``, ``tokenize_line``).

    Args:
        sections: token ids between two ``BREAK``, without start and end.
        length: of a chunk, 75 for CLIP.
        comma: the id of a comma that ends a word; None where the vocabulary has none.
    """
    chunks: list[list[int]] = []
    chunk: list[int] = []
    place = 0
    for number, ids in enumerate(sections):
        if number:
            chunks.append(chunk)
            chunk = []
        last_comma = -1
        for token in ids:
            if token == comma:
                last_comma = len(chunk)
            elif len(chunk) == length and last_comma >= 0 and length - last_comma <= BACKTRACK:
                chunks.append(chunk[: last_comma + 1])
                chunk, last_comma = chunk[last_comma + 1 :], -1
            if len(chunk) == length:
                chunks.append(chunk)
                chunk, last_comma = [], -1
            chunk.append(place)
            place += 1
    return [*chunks, chunk] if chunk or not chunks else chunks


def take_lora_tags(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """A prompt without its ``<lora:NAME:SCALE>`` tags, and the names and scales that they state, in order.

    Raises:
        InputError: for a tag without a name, or whose scale is not one number.
    """
    found = []
    for match in _LORA.finditer(prompt):
        name, _, scale = match[1].partition(":")
        try:
            found.append((name.strip(), float(scale) if scale.strip() else 1.0))
        except ValueError:
            raise InputError(f"the scale in {excerpt(match[0])} is not one number; write <lora:NAME:0.8>") from None
        if not name.strip():
            raise InputError(f"{excerpt(match[0])} names no LoRA; write <lora:NAME:0.8>")
    return (_LORA.sub("", prompt).strip() if found else prompt), tuple(found)


def lora_tags(loras: Iterable[tuple[str, float]]) -> str:
    """The tags that name LoRAs, as :func:`take_lora_tags` reads them."""
    return " ".join(f"<lora:{name}:{repr(scale).removesuffix('.0')}>" for name, scale in loras)


def apply_weights(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Text states with each token's multiplied by its weight, scaled to the mean that they had where they have one.

    Args:
        states: of one prompt, ``[tokens, D]`` float32.
        weights: ``[tokens]``.
    """
    if (weights == 1).all():
        return states
    changed = states * weights[:, None].astype(states.dtype)
    before, after = float(states.mean(dtype=np.float64)), float(changed.mean(dtype=np.float64))
    if min(abs(before), abs(after)) < NO_MEAN * float(states.std()):
        return changed
    return changed * states.dtype.type(before / after)

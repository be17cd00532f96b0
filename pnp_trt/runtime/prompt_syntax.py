"""Prompts in AUTOMATIC1111's syntax: weighted parts, and chunks of the text encoder's length.

=================  =========================================================
``(x)``            1.1 times the weight; nested brackets multiply
``[x]``            the weight divided by 1.1
``(x:1.3)``        1.3 times the weight
``\\(``, ``\\]``     a literal bracket
``(x`` unclosed    applies up to the end of the prompt
``BREAK``          begins a new chunk
=================  =========================================================

``<lora:x:0.8>`` names a LoRA and its scale, 1 by default (:func:`take_lora_tags`); servers support it.

A token's weight multiplies its text state; a chunk's states are then scaled back to their original mean, which is
A1111's emphasis "Original".  A prompt is split into chunks of 75 tokens (:func:`cut_chunks`), each chunk is encoded
separately between a start and an end token, and the states are concatenated.  Prompt editing (``[a:b:0.5]``) is not
supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import InputError
from ..io.inputs import excerpt

PLAIN, A1111 = "plain", "a1111"
#: supported prompt syntaxes
SYNTAXES = (PLAIN, A1111)
#: weight of a bracket without a number
STEP = 1.1
#: largest weight; larger ones are meaningless, because the states are scaled back to their mean
LARGEST = 100.0
#: means of states below this fraction of their standard deviation are noise, and are not used for scaling
NO_MEAN = 0.01
_TOKEN = re.compile(r"\\[\\()\[\]]|[(\[)\]]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]")
#: a full chunk ends at a comma among this many of its last tokens (A1111's "comma padding backtrack")
BACKTRACK = 20
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_LORA = re.compile(r"<lora:([^<>]*)>")


def check_syntax(syntax: str) -> None:
    """Raise ``InputError`` for a syntax that is not one of ``SYNTAXES``."""
    if syntax not in SYNTAXES:
        raise InputError(f"the prompt syntax is '{syntax}'; known: {', '.join(SYNTAXES)}")


#: (text, weight) pairs
Parts = list[tuple[str, float]]


def weighted_parts(prompt: str) -> list[Parts]:
    """Split a prompt into weighted parts, one list per section between ``BREAK``s; join neighbours of equal weight.

    A ``BREAK`` inside brackets counts too, and the brackets continue after it.

    Raises:
        InputError: for a weight beyond ±100.
    """
    texts: list[str | None] = []  # None represents BREAK
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
            pieces = [token[1]] if len(token) == 2 and token[0] == "\\" else _BREAK.split(token)
            for number, text in enumerate(pieces):
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
    """Replace each ``BREAK`` of a prompt by a space."""
    return _BREAK.sub(" ", prompt)


def cut_chunks(sections: Sequence[Sequence[int]], length: int, comma: int | None) -> list[list[int]]:
    """Split a prompt's tokens into chunks of at most ``length``; return the indices of each chunk's tokens.

    Indices count through all sections.  A chunk ends at a ``BREAK`` or when it is full: after its last comma if at most
    20 tokens follow it, else before the next token.  These are AUTOMATIC1111's rules (``modules/sd_hijack_clip.py``,
    ``tokenize_line``).

    Args:
        sections: token ids of each section between ``BREAK``s, without start and end.
        length: tokens of a chunk, 75 for CLIP.
        comma: the id of a comma that ends a word; None if the vocabulary has none.
    """
    chunks: list[list[int]] = []
    chunk: list[int] = []
    index = 0
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
            chunk.append(index)
            index += 1
    return [*chunks, chunk] if chunk or not chunks else chunks


def take_lora_tags(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Remove a prompt's ``<lora:NAME:SCALE>`` tags; return the prompt, and the tags' names and scales in order.

    Raises:
        InputError: if a tag has no name, or its scale is not a single number.
    """
    loras = []
    for match in _LORA.finditer(prompt):
        name, _, scale = match[1].partition(":")
        try:
            loras.append((name.strip(), float(scale) if scale.strip() else 1.0))
        except ValueError:
            raise InputError(f"the scale in {excerpt(match[0])} is not one number; write <lora:NAME:0.8>") from None
        if not name.strip():
            raise InputError(f"{excerpt(match[0])} names no LoRA; write <lora:NAME:0.8>")
    return (_LORA.sub("", prompt).strip() if loras else prompt), tuple(loras)


def lora_tags(loras: Iterable[tuple[str, float]]) -> str:
    """The tags of LoRAs, as read by :func:`take_lora_tags`."""
    return " ".join(f"<lora:{name}:{repr(scale).removesuffix('.0')}>" for name, scale in loras)


def apply_weights(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply each token's text state by its weight, then scale the states back to their mean unless it is noise.

    Args:
        states: states of one prompt, ``[tokens, D]`` float32.
        weights: ``[tokens]``.
    """
    if (weights == 1).all():
        return states
    changed = states * weights[:, None].astype(states.dtype)
    before, after = float(states.mean(dtype=np.float64)), float(changed.mean(dtype=np.float64))
    if min(abs(before), abs(after)) < NO_MEAN * float(states.std()):
        return changed
    return changed * states.dtype.type(before / after)

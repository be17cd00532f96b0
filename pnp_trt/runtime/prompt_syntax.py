"""Prompts in AUTOMATIC1111's syntax: parts of more or less weight.

=================  =========================================================
``(x)``            1.1 times the weight; nested ones multiply
``[x]``            the weight divided by 1.1
``(x:1.3)``        1.3 times the weight
``\\(``, ``\\]``     the bracket itself
``(x`` unclosed    counts to the end of the prompt
=================  =========================================================

``<lora:x:0.8>`` names a LoRA and its scale, 1 where none is stated (:func:`take_lora_tags`); servers take it.

A token's weight multiplies its text state; the prompt's states are then scaled back to the mean that they had, which is
A1111's emphasis "Original".  Prompt editing (``[a:b:0.5]``) and ``BREAK`` are not interpreted: an engine's text states
are one chunk of 77 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_LORA = re.compile(r"<lora:([^<>]*)>")


def check_syntax(syntax: str) -> None:
    """Raise ``InputError`` for a syntax that is not one of ``SYNTAXES``."""
    if syntax not in SYNTAXES:
        raise InputError(f"the prompt syntax is '{syntax}'; known: {', '.join(SYNTAXES)}")


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """A prompt's parts with their weights; neighbours of one weight are joined.

    Raises:
        InputError: for a weight beyond ±100.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= by

    for match in _TOKEN.finditer(_BREAK.sub(" ", prompt)):
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
            texts.append(token[1] if len(token) == 2 and token[0] == "\\" else token)
            weights.append(1.0)
    for start in opened["("]:
        multiply(start, STEP)
    for start in opened["["]:
        multiply(start, 1 / STEP)
    parts: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if parts and parts[-1][1] == weight:
            parts[-1] = parts[-1][0] + text, weight
        else:
            parts.append((text, weight))
    return parts


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

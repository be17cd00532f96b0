"""CLIP's tokenizer without transformers: the bundle's ``tokenizer.json`` run by the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.tokenizer_file import check_tokenizer, read_tokenizer
from ..errors import InputError, PnpError
from ..io.inputs import excerpt
from ..io.text import printable
from .prompt_syntax import Parts, cut_chunks

_ADVICE = "build the bundle again, or use one that pnp-trt build made"
# Parsing and checking 49,000 words takes half a second, and most bundles have CLIP's.  A backend is only read.
_BACKENDS: dict[tuple[bytes, int], Any] = {}
_KEPT = 4
_LOCK = threading.Lock()
#: CLIP's token of a comma that ends a word
_COMMA = ",</w>"
#: token ids ``[length]`` int64 and the weight of each, ``[length]`` float32; start, end and padding have weight 1
Chunk = tuple[np.ndarray, np.ndarray]


class Tokenizer:
    """A prompt → padded token ids, as ``CLIPTokenizer(padding="max_length", truncation=True)`` gives them.

    Args:
        path: a ``tokenizer.json``.
        length: tokens a prompt is padded and cut to, start and end included (77 for CLIP).
        pad: id that fills the rest.
        vocabulary: rows of the text encoder's embedding table; every id is below.

    Raises:
        InputError: if the file has other components than CLIP's tokenizer, or ids outside the embedding table.
    """

    def __init__(self, path: Path, length: int = 77, pad: int = 49407, vocabulary: int = 49408) -> None:
        if not 0 <= pad < vocabulary:
            raise InputError(f"{path.parent}: tokens.pad is {pad}; it must be from 0 to {vocabulary - 1}; {_ADVICE}")
        self._backend = _backend(path, vocabulary)
        self.length, self.pad = length, pad
        self._ends = tuple(self._backend.encode("").ids)

    def weighted(self, parts: Parts) -> Chunk:
        """A prompt in parts as one chunk; what is too long is cut with a warning that shows what was dropped."""
        words = self._words([parts])
        if (most := self.length - 2) < len(words.ids):
            warnings.warn(
                f"the prompt has {len(words.ids) + 2} tokens and was cut to {self.length}; dropped: "
                f"{_shown(words.rest(most))}; --prompt-syntax a1111 reads longer ones with an engine that was built "
                f"with --tokens {2 * self.length} or above",
                stacklevel=3,
            )
        return self._chunk(words, range(min(most, len(words.ids))))

    def chunks(self, sections: Sequence[Parts], most: int) -> list[Chunk]:
        """A prompt's sections in chunks (``prompt_syntax.cut_chunks``), at least one and at most ``most``.

        What is too long is cut with a warning that shows what was dropped.
        """
        words = self._words(sections)
        places = self._cut(words)
        if len(places) > most:
            warnings.warn(
                f"the prompt has {len(places)} chunks of {self.length} tokens and was cut to {most}; dropped: "
                f"{_shown(words.rest(_first(places[most:])))}; build the engine with more --tokens",
                stacklevel=3,
            )
        return [self._chunk(words, part) for part in places[:most]]

    def count(self, sections: Sequence[Parts]) -> int:
        """Chunks that a prompt has, however many are taken."""
        return len(self._cut(self._words(sections)))

    def dropped(self, sections: Sequence[Parts], most: int) -> str:
        """The end of a prompt for which ``most`` chunks have no room; empty where they have."""
        words = self._words(sections)
        if most == 1:  # of one section, which is full when it is full
            return words.rest(self.length - 2)
        places = self._cut(words)
        return words.rest(_first(places[most:])) if len(places) > most else ""

    def _cut(self, words: _Words) -> list[list[int]]:
        return cut_chunks(words.sections(), self.length - 2, self._backend.token_to_id(_COMMA))

    def _words(self, sections: Sequence[Parts]) -> _Words:
        """Each part is tokenised by itself, as AUTOMATIC1111 does."""
        found = _Words(sections)
        for number, parts in enumerate(sections):
            for part, (text, weight) in enumerate(parts):
                encoding = self._backend.encode(text)
                found.ids += encoding.ids[1:-1]
                found.weights += [weight] * (len(encoding.ids) - 2)
                found.places += [(number, part, offset[0]) for offset in encoding.offsets[1:-1]]
        return found

    def _chunk(self, words: _Words, places: Sequence[int]) -> Chunk:
        """Some of a prompt's tokens between start and end, padded."""
        start, end = self._ends
        out = np.full(self.length, self.pad, np.int64)
        held = [start, *(words.ids[i] for i in places), end]
        out[: len(held)] = held
        scales = np.ones(self.length, np.float32)
        scales[1 : 1 + len(places)] = [words.weights[i] for i in places]
        return out, scales


@dataclass
class _Words:
    """A prompt's tokens without start and end: their ids, weights, and places (section, part, character)."""

    given: Sequence[Parts]
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)

    def sections(self) -> list[list[int]]:
        """The ids of each section."""
        found: list[list[int]] = [[] for _ in self.given]
        for token, (section, _, _) in zip(self.ids, self.places, strict=True):
            found[section].append(token)
        return found

    def rest(self, first: int) -> str:
        """The text from a token on; empty where there are fewer tokens."""
        if first >= len(self.places):
            return ""
        section, part, offset = self.places[first]
        parts = [self.given[section][part][0][offset:], *(text for text, _ in self.given[section][part + 1 :])]
        later = [" BREAK " + "".join(text for text, _ in parts) for parts in self.given[section + 1 :]]
        return "".join([*parts, *later]).strip()


def _first(chunks: Sequence[Sequence[int]]) -> int:
    """The first token of chunks; beyond all of them where they are empty."""
    return next((chunk[0] for chunk in chunks if chunk), sys.maxsize)


def _shown(text: str) -> str:
    """A text that may be long, as a message shows it: its beginning and its end."""
    return excerpt(text if len(text) <= 140 else f"{text[:60]} … {text[-60:]}", 200)


def _backend(path: Path, vocabulary: int) -> Any:
    """The library's tokenizer of a file; equal files share one."""
    raw = read_tokenizer(path, _ADVICE)
    key = hashlib.sha256(raw).digest(), vocabulary
    with _LOCK:
        if key not in _BACKENDS:
            made = _load(path, raw, vocabulary)
            while len(_BACKENDS) >= _KEPT:
                _BACKENDS.pop(next(iter(_BACKENDS)))
            _BACKENDS[key] = made
        return _BACKENDS[key]


def _load(path: Path, raw: bytes, vocabulary: int) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(check_tokenizer(path, raw, vocabulary, _ADVICE))
    except PnpError:
        raise
    except Exception as e:  # the library raises plain exceptions
        raise InputError(f"{path} is not a tokenizer ({printable(e, limit=200)}); {_ADVICE}") from None
    backend.no_padding()
    backend.no_truncation()
    if (count := len(backend.encode("").ids)) != 2:
        raise InputError(f"{path} puts {count} tokens around a prompt, not a start and an end; {_ADVICE}")
    return backend

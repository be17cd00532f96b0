"""CLIP's tokenizer without transformers: the ``tokenizers`` library with the bundle's ``tokenizer.json``."""

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
# Cache: parsing and checking 49,000 words takes half a second, and most bundles have CLIP's.  Backends are read-only.
_BACKENDS: dict[tuple[bytes, int], Any] = {}
_KEPT = 4
_LOCK = threading.Lock()
#: CLIP's token of a comma that ends a word
_COMMA = ",</w>"
#: token ids ``[length]`` int64 and their weights ``[length]`` float32; start, end and padding have weight 1
Chunk = tuple[np.ndarray, np.ndarray]


class Tokenizer:
    """Converts prompts to padded token ids, like ``CLIPTokenizer(padding="max_length", truncation=True)``.

    Args:
        path: a ``tokenizer.json``.
        length: number of tokens that prompts are padded and truncated to, including start and end (77 for CLIP).
        pad: id of the padding token.
        vocabulary: rows of the text encoder's embedding table; all ids must be below.

    Raises:
        InputError: if the file has components other than those of CLIP's tokenizer, or ids outside the embedding table.
    """

    def __init__(self, path: Path, length: int = 77, pad: int = 49407, vocabulary: int = 49408) -> None:
        if not 0 <= pad < vocabulary:
            raise InputError(f"{path.parent}: tokens.pad is {pad}; it must be from 0 to {vocabulary - 1}; {_ADVICE}")
        self._backend = _backend(path, vocabulary)
        self.length, self.pad = length, pad
        self._ends = tuple(self._backend.encode("").ids)

    def weighted(self, parts: Parts) -> Chunk:
        """Tokenise a weighted prompt to one chunk; if it is too long, truncate it and warn with the text dropped."""
        words = self._words([parts])
        if (most := self.length - 2) < len(words.ids):
            warnings.warn(
                f"the prompt has {len(words.ids) + 2} tokens and was cut to {self.length}; dropped: "
                f"{_shown(words.rest(most))}; for longer ones, use --prompt-syntax a1111 with an engine that was built "
                f"with --tokens {2 * self.length} or more",
                stacklevel=3,
            )
        return self._chunk(words, range(min(most, len(words.ids))))

    def chunks(self, sections: Sequence[Parts], most: int) -> list[Chunk]:
        """Tokenise a prompt's sections to chunks (``prompt_syntax.cut_chunks``), at least one and at most ``most``.

        If there are more, drop the rest and warn with the text dropped.
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
        """Number of chunks of a prompt, without a limit."""
        return len(self._cut(self._words(sections)))

    def dropped(self, sections: Sequence[Parts], most: int) -> str:
        """The end of a prompt that does not fit into ``most`` chunks; empty if all of it fits."""
        words = self._words(sections)
        if most == 1:  # a single chunk is cut when it is full, not at a comma
            return words.rest(self.length - 2)
        places = self._cut(words)
        return words.rest(_first(places[most:])) if len(places) > most else ""

    def _cut(self, words: _Words) -> list[list[int]]:
        return cut_chunks(words.sections(), self.length - 2, self._backend.token_to_id(_COMMA))

    def _words(self, sections: Sequence[Parts]) -> _Words:
        """Tokenise each part separately, as AUTOMATIC1111 does."""
        words = _Words(sections)
        for number, parts in enumerate(sections):
            for part, (text, weight) in enumerate(parts):
                encoding = self._backend.encode(text)
                words.ids += encoding.ids[1:-1]
                words.weights += [weight] * (len(encoding.ids) - 2)
                words.places += [(number, part, offset[0]) for offset in encoding.offsets[1:-1]]
        return words

    def _chunk(self, words: _Words, places: Sequence[int]) -> Chunk:
        """A chunk of some of a prompt's tokens, with start, end and padding."""
        start, end = self._ends
        out = np.full(self.length, self.pad, np.int64)
        ids = [start, *(words.ids[i] for i in places), end]
        out[: len(ids)] = ids
        scales = np.ones(self.length, np.float32)
        scales[1 : 1 + len(places)] = [words.weights[i] for i in places]
        return out, scales


@dataclass
class _Words:
    """A prompt's tokens without start and end: ids, weights, and positions (section, part, character)."""

    source: Sequence[Parts]
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)

    def sections(self) -> list[list[int]]:
        """The token ids of each section."""
        sections: list[list[int]] = [[] for _ in self.source]
        for token, (section, _, _) in zip(self.ids, self.places, strict=True):
            sections[section].append(token)
        return sections

    def rest(self, first: int) -> str:
        """The text from the token with index ``first`` to the end; empty if there are fewer tokens."""
        if first >= len(self.places):
            return ""
        section, part, offset = self.places[first]
        parts = [self.source[section][part][0][offset:], *(text for text, _ in self.source[section][part + 1 :])]
        later = [" BREAK " + "".join(text for text, _ in parts) for parts in self.source[section + 1 :]]
        return "".join([*parts, *later]).strip()


def _first(chunks: Sequence[Sequence[int]]) -> int:
    """Index of the first token of some chunks; larger than any index if they are empty."""
    return next((chunk[0] for chunk in chunks if chunk), sys.maxsize)


def _shown(text: str) -> str:
    """Shorten a text for a message to its beginning and its end."""
    return excerpt(text if len(text) <= 140 else f"{text[:60]} … {text[-60:]}", 200)


def _backend(path: Path, vocabulary: int) -> Any:
    """The library's tokenizer for a file, cached by the file's contents."""
    raw = read_tokenizer(path, _ADVICE)
    key = hashlib.sha256(raw).digest(), vocabulary
    with _LOCK:
        if key not in _BACKENDS:
            backend = _load(path, raw, vocabulary)
            while len(_BACKENDS) >= _KEPT:
                _BACKENDS.pop(next(iter(_BACKENDS)))
            _BACKENDS[key] = backend
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

"""CLIP's tokenizer without transformers: the bundle's ``tokenizer.json`` run by the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.tokenizer_file import check_tokenizer, read_tokenizer
from ..errors import InputError, PnpError
from ..io.inputs import check_prompts, excerpt
from ..io.text import printable

_ADVICE = "build the bundle again, or use one that pnp-trt build made"
# Parsing and checking 49,000 words takes half a second, and most bundles have CLIP's.  A backend is only read.
_BACKENDS: dict[tuple[bytes, int], Any] = {}
_KEPT = 4
_LOCK = threading.Lock()


class Tokenizer:
    """Prompts → padded token ids, as ``CLIPTokenizer(padding="max_length", truncation=True)`` gives them.

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

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Ids ``[N, length]`` int64.  A prompt that is too long is cut with a warning that shows what was dropped."""
        out = np.full((len(prompts), self.length), self.pad, np.int64)
        check_prompts(prompts)
        for row, prompt in enumerate(prompts):
            out[row] = self.weighted([(prompt, 1.0)])[0]
        return out

    def weighted(self, parts: Sequence[tuple[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``[length]`` int64 of a prompt in parts, and the weight of each, ``[length]`` float32.

        Each part is tokenised by itself, as AUTOMATIC1111 does.  Start, end and padding have weight 1.  What is too
        long is cut with a warning that shows what was dropped.
        """
        ids, weights, places = [], [], []
        start = end = self.pad
        for number, (text, weight) in enumerate(parts):
            encoding = self._backend.encode(text)
            start, *inner, end = encoding.ids
            ids += inner
            weights += [weight] * len(inner)
            places += [(number, offset[0]) for offset in encoding.offsets[1:-1]]
        if (most := self.length - 2) < len(ids):
            number, offset = places[most]
            rest = parts[number][0][offset:] + "".join(text for text, _ in parts[number + 1 :])
            warnings.warn(
                f"the prompt has {len(ids) + 2} tokens and was cut to {self.length}; dropped: "
                f"{excerpt(_excerpt(rest.strip()), 200)}",
                stacklevel=3,
            )
        out = np.full(self.length, self.pad, np.int64)
        held = [start, *ids[:most], end]
        out[: len(held)] = held
        scales = np.ones(self.length, np.float32)
        scales[1 : 1 + len(weights[:most])] = weights[:most]
        return out, scales


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


def _excerpt(text: str, ends: int = 60) -> str:
    """A text that may be long, as a message shows it: its beginning and its end."""
    return text if len(text) <= 2 * ends + 20 else f"{text[:ends]} … {text[-ends:]}"

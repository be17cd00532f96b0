"""CLIP's tokenizer without transformers: the bundle's ``tokenizer.json`` run by the ``tokenizers`` library."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from ..bundle.tokenizer_file import read_tokenizer
from ..errors import InputError, PnpError
from ..io.inputs import check_prompts, excerpt
from ..io.text import printable

_ADVICE = "build the bundle again, or use one that pnp-trt build made"


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
        from tokenizers import Tokenizer as Backend

        if not 0 <= pad < vocabulary:
            raise InputError(f"{path.parent}: tokens.pad is {pad}; it must be from 0 to {vocabulary - 1}; {_ADVICE}")
        try:
            self._backend = Backend.from_str(read_tokenizer(path, vocabulary, _ADVICE))
        except PnpError:
            raise
        except Exception as e:  # the library raises plain exceptions
            raise InputError(f"{path} is not a tokenizer ({printable(e, limit=200)}); {_ADVICE}") from None
        self._backend.no_padding()
        self._backend.no_truncation()
        if (count := len(self._backend.encode("").ids)) != 2:
            raise InputError(f"{path} puts {count} tokens around a prompt, not a start and an end; {_ADVICE}")
        self.length, self.pad = length, pad

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Ids ``[N, length]`` int64.  A prompt that is too long is cut with a warning that shows what was dropped."""
        out = np.full((len(prompts), self.length), self.pad, np.int64)
        check_prompts(prompts)
        for row, prompt in enumerate(prompts):
            encoding = self._backend.encode(prompt)
            ids = encoding.ids
            if len(ids) > self.length:
                dropped = _excerpt(prompt[encoding.offsets[self.length - 1][0] :].strip())
                warnings.warn(
                    f"the prompt has {len(ids)} tokens and was cut to {self.length}; dropped: {excerpt(dropped, 200)}",
                    stacklevel=2,
                )
                ids = [*ids[: self.length - 1], ids[-1]]
            out[row, : len(ids)] = ids
        return out


def _excerpt(text: str, ends: int = 60) -> str:
    """A text that may be long, as a message shows it: its beginning and its end."""
    return text if len(text) <= 2 * ends + 20 else f"{text[:ends]} … {text[-ends:]}"

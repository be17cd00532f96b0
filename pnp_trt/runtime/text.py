"""The U-Net's inputs from prompts: text states, pooled text, and SDXL's image sizes (micro-conditioning)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle.manifest import TIME_IDS, Manifest, tokenizer_file
from ..bundle.profiles import Size
from ..bundle.store import Bundle
from ..errors import InputError
from ..io.text import printable
from ..sampling.network import STATES, Network
from .prompt_syntax import PLAIN, Parts, apply_weights, weighted_parts, without_breaks
from .tokenizer import Tokenizer

#: maximum of an original size, a crop or a target size, in pixels
MAX_PIXELS = 1 << 16


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts; ``np.asarray`` returns only the states.

    Attributes:
        states: ``[N, tokens, D]`` float32; those of several encoders are concatenated along D.
        added: the U-Net's other inputs from prompts, by name: ``text_embeds [N, D2]`` for SDXL.
    """

    states: np.ndarray
    added: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, text: Text | np.ndarray) -> Text:
        """Return a ``Text`` unchanged; wrap an array of states."""
        return text if isinstance(text, Text) else cls(np.asarray(text))

    @classmethod
    def joined(cls, parts: Sequence[Text]) -> Text:
        """Concatenate the rows of several texts."""
        names = parts[0].added
        return cls(
            np.concatenate([p.states for p in parts]), {n: np.concatenate([p.added[n] for p in parts]) for n in names}
        )

    def repeated(self, count: int) -> Text:
        """Broadcast one row to ``count`` rows, without copying."""
        return self._each(lambda value: np.broadcast_to(value, (count, *value.shape[1:])))

    def longer(self, tokens: int, chunk: Callable[[], Text]) -> Text:
        """Pad to ``tokens`` with the states of ``chunk``, which has one row; return self if it is long enough."""
        if tokens <= self.states.shape[1]:
            return self
        empty = chunk().states
        padding = np.tile(empty, (len(self), (tokens - self.states.shape[1]) // empty.shape[1], 1))
        return Text(np.concatenate([self.states, padding], axis=1), self.added)

    def zeros(self) -> Text:
        """Zeros of the same shapes."""
        return self._each(np.zeros_like)

    def inputs(self) -> dict[str, np.ndarray]:
        """All arrays by the U-Net's input names."""
        return {STATES: self.states, **self.added}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the states."""
        return self.states.shape

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Text:
        """Select rows by a slice or a list."""
        return self._each(lambda value: value[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.states, dtype=dtype, copy=copy) if copy else np.asarray(self.states, dtype=dtype)

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Text:
        return Text(change(self.states), {name: change(value) for name, value in self.added.items()})


class TextEncoders:
    """The tokenizers and text encoders of a bundle.

    Args:
        load: loads a network of the bundle by name.
    """

    def __init__(self, bundle: Bundle, load: Callable[[str], Network]) -> None:
        manifest = bundle.manifest
        names = manifest.text_encoders
        self.networks: dict[str, Network] = {name: load(name) for name in names}
        self._tokenizers = [_tokenizer(bundle, name) for name in names]
        self._outputs = [tuple(manifest.networks[name].outputs)[1:] for name in names]
        #: names of the U-Net's inputs from prompts other than the states
        self.added: tuple[str, ...] = tuple(name for own in self._outputs for name in own)
        self._zeros = manifest.text.zero_empty_prompt
        #: tokens of a chunk, and maximum number of chunks of a prompt
        self.length, self.chunks = manifest.tokens.length, manifest.text.chunks
        self._empty: Text | None = None

    def __call__(self, prompts: Sequence[str], syntax: str = PLAIN) -> Text:
        """Encode N prompts separately, and pad them with empty chunks to the length of the longest.

        Args:
            syntax: one of ``SYNTAXES``; weights are applied to each encoder and chunk separately.
        """
        rows = [self._row(self._sections(p, syntax), syntax) for p in prompts]
        longest = max(row.shape[1] for row in rows)
        rows = [row.longer(longest, self.chunk) for row in rows]
        return rows[0] if len(rows) == 1 else Text.joined(rows)

    def tokens(self, prompt: str, syntax: str = PLAIN) -> int:
        """Number of tokens of a prompt's text states."""
        if syntax == PLAIN or self.chunks == 1:
            return self.length
        sections = weighted_parts(prompt)
        return self.length * min(self.chunks, max(tokenizer.count(sections) for tokenizer in self._tokenizers))

    def dropped(self, prompt: str, syntax: str = PLAIN) -> str:
        """The end of a prompt that is too long for the first text encoder; empty if all of it fits."""
        return self._tokenizers[0].dropped(self._sections(prompt, syntax), 1 if syntax == PLAIN else self.chunks)

    def empty(self, tokens: int) -> Text:
        """One row: the unconditional text states of CFG without a negative prompt."""
        text = self.chunk()
        text = text.zeros() if self._zeros else text
        return text.longer(tokens, lambda: text)

    def chunk(self) -> Text:
        """One row: the empty prompt, used to pad prompts with fewer chunks than others."""
        if self._empty is None:
            self._empty = self._row([[("", 1.0)]], PLAIN)
        return self._empty

    def _sections(self, prompt: str, syntax: str) -> list[Parts]:
        """Split a prompt at ``BREAK``, which is a space for an engine with one chunk."""
        if syntax == PLAIN:
            return [[(prompt, 1.0)]]
        return weighted_parts(prompt if self.chunks > 1 else without_breaks(prompt))

    def _row(self, sections: Sequence[Parts], syntax: str) -> Text:
        states: list[np.ndarray] = []
        added: dict[str, np.ndarray] = {}
        single = syntax == PLAIN or self.chunks == 1
        chunked = [[t.weighted(sections[0])] if single else t.chunks(sections, self.chunks) for t in self._tokenizers]
        most = max(map(len, chunked))
        for network, tokenizer, names, chunks in zip(
            self.networks.values(), self._tokenizers, self._outputs, chunked, strict=True
        ):
            chunks += [tokenizer.weighted([])] * (most - len(chunks))  # vocabularies may differ
            parts = []
            for number, (ids, weights) in enumerate(chunks):
                if names:
                    chunk, *others = network.outputs(input_ids=ids[None])
                    if number == 0:  # AUTOMATIC1111 takes the pooled text of the first chunk
                        added |= dict(zip(names, others, strict=True))
                else:
                    chunk = network(input_ids=ids[None])
                parts.append(chunk if syntax == PLAIN else apply_weights(chunk[0], weights)[None])
            states.append(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
        return Text(states[0] if len(states) == 1 else np.concatenate(states, axis=-1), added)


def sharpened(network: Network, text: Text, negative: Text, empty: Text, w: np.ndarray) -> Text:
    """Apply a guide's sharpener: change the prompts' text states by their negative prompts.

    Rows are computed separately.  If there are several chunks, each chunk of a prompt is changed by each chunk of the
    negative prompt and the changes are added; chunks that are the empty prompt change nothing and are skipped.

    Args:
        network: the bundle's sharpener.
        text, negative: N prompts and negative prompts, of the same number of tokens.
        empty: the empty prompt, one row of one chunk.
        w: guidance scales, ``[N]``.
    """
    length = empty.shape[1]
    out = np.array(text.states)
    for row, others, scale in zip(out, negative.states, w, strict=True):
        for start in range(0, len(row), length):
            chunk = row[None, start : start + length].copy()
            for other in others.reshape(-1, 1, length, others.shape[-1]):
                if not np.array_equal(other, empty.states):
                    changed = network(
                        **{STATES: chunk}, negative=other, empty=empty.states, guidance=np.array([scale], np.float32)
                    )
                    row[start : start + length] += changed[0] - chunk[0]
    return Text(out, text.added)


def _tokenizer(bundle: Bundle, encoder: str) -> Tokenizer:
    tokens = bundle.manifest.tokens_of(encoder)
    return Tokenizer(
        bundle.folder / tokenizer_file(encoder), tokens.length, tokens.pad, bundle.manifest.vocabulary_of(encoder)
    )


@dataclass(frozen=True)
class ImageSizes:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2), heights before widths, in pixels.

    Attributes:
        original: size of the training image before it was cropped; None means the image's size.
        crop: top and left edge of the crop.
        target: size after the crop; None means the image's size.

    Raises:
        InputError: if a size or an edge is out of bounds.
    """

    original: Size | None = None
    crop: Size = (0, 0)
    target: Size | None = None

    def __post_init__(self) -> None:
        for name, pair, low in (("original size", self.original, 1), ("crop", self.crop, 0),
                                ("target size", self.target, 1)):  # fmt: skip
            if pair is not None and not (len(pair) == 2 and all(low <= int(p) <= MAX_PIXELS for p in pair)):
                raise InputError(
                    f"the {name} is {'x'.join(map(str, pair))}; give two whole numbers from {low} to {MAX_PIXELS}"
                )

    @classmethod
    def parse(cls, original: str | None, crop: str | None, target: str | None) -> ImageSizes | None:
        """Parse texts such as ``1024x768``; return None if all are None.

        Raises:
            InputError: if a text has another form, or a number is out of bounds.
        """
        if original is None and crop is None and target is None:
            return None
        pairs = [
            None if text is None else _pair(option, text)
            for option, text in (("--original-size", original), ("--crop", crop), ("--target-size", target))
        ]
        return cls(pairs[0], pairs[1] or (0, 0), pairs[2])

    def time_ids(self, size: Size, count: int) -> np.ndarray:
        """The U-Net's input ``time_ids [count, 6]`` float32 for images of ``size``."""
        row = [*(self.original or size), *self.crop, *(self.target or size)]
        return np.tile(np.array(row, np.float32), (count, 1))

    def parameters(self) -> dict[str, str]:
        """Values to record in an image: those that are not the default."""
        crop = self.crop if any(self.crop) else None
        sizes = {"original_size": self.original, "crop": crop, "target_size": self.target}
        return {name: f"{pair[0]}x{pair[1]}" for name, pair in sizes.items() if pair is not None}


def _pair(option: str, text: str) -> Size:
    if (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)) is None:
        raise InputError(
            f"{option} is '{printable(text, limit=80)}'; give two whole numbers of pixels, such as 1024x768"
        )
    return int(match[1]), int(match[2])


def takes_sizes(manifest: Manifest) -> bool:
    """Whether the U-Net takes image sizes."""
    return TIME_IDS in manifest.networks["unet"].inputs

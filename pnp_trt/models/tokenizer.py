"""Loading of CLIP's tokenizer from a model's folder, with checks of its files and against the text encoder."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.inputs import read_text
from .files import read_json

#: a larger length means that the tokenizer's files state none; transformers then returns 10³⁰
_NO_LENGTH = 10**6
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def load_tokenizer(folder: Path, encoder: Mapping[str, Any]) -> Any:
    """Load a ``CLIPTokenizer`` whose ``model_max_length`` is the length that prompts are padded and truncated to.

    Args:
        folder: folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, and their configs.
        encoder: the text encoder's config.

    Raises:
        InputError: if a file is damaged, the tokenizer is of another kind, or its vocabulary or length exceeds that of
            the text encoder.
    """
    from transformers import CLIPTokenizer

    with _readable(folder) as readable:
        config = _kind(readable)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(readable, local_files_only=True)
        except Exception as e:  # OSError, ValueError, TypeError …, depending on the fault
            reason = (str(e).splitlines() or [type(e).__name__])[0].replace(str(readable), str(folder))
            raise InputError(f"{folder} does not load as CLIP's tokenizer ({reason}); download it again") from e
    vocabulary, tokens = encoder.get("vocab_size", 49408), len(tokenizer)
    if tokens > vocabulary:
        raise InputError(
            f"{folder} has {tokens} tokens, but the text encoder embeds {vocabulary}; "
            "use the tokenizer and the text encoder of one model"
        )
    if tokenizer.pad_token_id is None:
        raise InputError(f"{folder} has no padding token; set pad_token in its tokenizer_config.json")
    tokenizer.model_max_length = _length(config, tokenizer, folder, encoder.get("max_position_embeddings", 77))
    return tokenizer


def _length(config: Mapping[str, Any], tokenizer: Any, folder: Path, positions: int) -> int:
    """Number of tokens of a prompt: the length that the tokenizer states, else the text encoder's positions."""
    length = tokenizer.model_max_length
    if isinstance(length, int | float) and length > _NO_LENGTH:
        return positions
    if not isinstance(length, int) or not 2 <= length <= positions:
        raise InputError(
            f"{folder} has model_max_length = {length!r}, but the text encoder has {positions} positions; "
            f"set model_max_length in tokenizer_config.json to {positions}"
        )
    return length


def _kind(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    kind = config.get("tokenizer_class")
    if kind is not None and not str(kind).startswith("CLIPTokenizer"):
        raise InputError(f"{path}: the tokenizer is a {kind}; known: CLIPTokenizer")
    return config


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """Yield the folder itself, or a copy without byte order marks, which transformers cannot read."""
    texts = {p.name: p for p in sorted(folder.glob("*.json"))}
    for path in texts.values():
        read_json(path)
    marked = {n for n, p in texts.items() if _starts_with_mark(p)}
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="pnp-trt-tokenizer-") as name:
        for path in folder.iterdir():
            if path.name in marked:
                (Path(name) / path.name).write_text(read_text(path), encoding="utf-8")
            elif path.is_file():
                (Path(name) / path.name).symlink_to(path.absolute())
        yield Path(name)


def _starts_with_mark(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(3).startswith(_MARKS)


def copy_tokenizer(base: Any, spec: Any, target: Path) -> dict[str, int]:
    """Write a base model's tokenizer as one JSON file; return its length and padding id, ``{"length", "pad"}``.

    Args:
        base: a :class:`~pnp_trt.models.teacher.BaseModel`.
        spec: the text encoder, a :class:`~pnp_trt.models.specs.TextEncoderSpec`.
    """
    tokenizer = base.tokenizer(spec)
    source = base.tokenizer_folder(spec) / "tokenizer.json"
    if source.is_file():
        target.write_text(read_text(source), encoding="utf-8")
    else:
        tokenizer.backend_tokenizer.save(str(target))
    return {"length": int(tokenizer.model_max_length), "pad": int(tokenizer.pad_token_id)}

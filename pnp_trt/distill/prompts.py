"""What a user hands to distillation: a file of prompts, or a folder of captioned pictures."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LISTED = 5


def read_prompts(path: Path, limit: int = 1000) -> list[str]:
    """Prompts from a text file, one a line; blank lines are left out.

    Raises:
        InputError: if the file is missing, empty, not UTF-8, or a line has more than ``limit`` characters.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"the prompts file {path} does not exist; pass a text file with one prompt a line") from None
    except UnicodeDecodeError as e:
        raise InputError(f"the prompts file {path} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) > limit:
            raise InputError(f"{path}, line {number} has {len(line)} characters; a prompt has at most {limit}")
    if not prompts:
        raise InputError(f"the prompts file {path} holds no prompt; write one a line")
    return prompts


def warn_of_long_prompts(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Warn of prompts that the text encoder cuts, and return them."""
    limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    long = [p for p, n in zip(prompts, lengths, strict=True) if n > limit]
    if long:
        warnings.warn(
            f"{len(long)} of {len(prompts)} prompts have more than {limit} tokens and are cut there "
            f"(the first: '{long[0][:60]}')",
            stacklevel=2,
        )
    return long


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures that can be read and have a caption.

    Attributes:
        files, captions: of the same length.
        skipped: ``(file name, why)`` of the others.
    """

    files: list[Path]
    captions: list[str]
    skipped: list[tuple[str, str]]


def find_pictures(folder: Path) -> CaptionedPictures:
    """Pictures of a folder with captions from ``metadata.jsonl`` (``file_name``, ``text``) or ``NAME.txt`` beside each.

    Pictures that are empty, cannot be decoded or have no caption are skipped, with a warning that lists them.

    Raises:
        InputError: if there is no folder, no usable picture, or ``metadata.jsonl`` is no JSON.
    """
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise InputError(f"the picture folder {folder} does not exist; pass a folder of captioned pictures")
    known = _metadata(folder)
    files, captions, skipped = [], [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        name = str(path.relative_to(folder))
        beside = path.with_suffix(".txt")
        text = known.get(name) or (beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else "")
        try:
            if not path.stat().st_size:
                raise OSError("the file is empty")
            with Image.open(path) as picture:
                picture.load()
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            why = "it is no picture" if isinstance(e, UnidentifiedImageError) else str(e)
            skipped.append((name, why))
            continue
        if not text.strip():
            skipped.append((name, "it has no caption"))
            continue
        files.append(path)
        captions.append(" ".join(text.split()))
    if skipped:
        some = "; ".join(f"{name} ({why})" for name, why in skipped[:LISTED])
        more = f" and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
        warnings.warn(f"{len(skipped)} pictures of {folder} are skipped: {some}{more}", stacklevel=2)
    if not files:
        raise InputError(
            f"{folder} holds no usable picture; it wants {', '.join(SUFFIXES)} files with captions in metadata.jsonl "
            "(file_name, text) or in NAME.txt beside each"
        )
    return CaptionedPictures(files, captions, skipped)


def _metadata(folder: Path) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {str(r["file_name"]): str(r["text"]) for r in rows}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} cannot be read ({e}); each line is a JSON object with file_name and text") from e


def encode_pictures(vae: Any, files: list[Path], side: int, device: torch.device, batch: int = 16) -> Tensor:
    """Latents ``[N, C, h, w]`` float32, scaled as the U-Net wants them, of pictures cropped to a square of ``side``."""
    import torch
    from PIL import Image, ImageOps

    vae.to(device)
    out = []
    for start in range(0, len(files), batch):
        rows = []
        for path in files[start : start + batch]:
            with Image.open(path) as picture:
                square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            rows.append(torch.from_numpy(np.asarray(square).copy()))
        x = torch.stack(rows).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(device)
        with torch.no_grad():
            code = vae.encode(x)
        # the mean of the posterior: the noise of a draw would be noise on the teacher's input
        z = code.latents if hasattr(code, "latents") else code.latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        out.append(((z - shift) * vae.config.scaling_factor).float().cpu())
    return torch.cat(out)

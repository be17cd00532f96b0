"""Inputs of distillation: a file of prompts, or a folder of captioned images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..io.image_files import SUFFIXES, ImageError, read_rgb
from ..io.inputs import check_prompts, excerpt, is_folder, lines, parse_json, read_text, warn_of_syntax
from ..io.json_schema import problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LISTED = 5
_METADATA_ROW = {
    "type": "object",
    "required": ["file_name", "text"],
    "properties": {"file_name": {"type": "string"}, "text": {"type": "string"}},
}


def read_prompts(path: Path, limit: int = 1000) -> list[str]:
    """Read prompts from a text file, one per line; blank lines are skipped.

    Raises:
        InputError: if the file is missing, empty, not text, or a line has more than ``limit`` characters.
    """
    rows = lines(read_text(path, "the prompts file", "pass a text file with one prompt per line"))
    for number, line in enumerate(rows, 1):
        if len(line) > limit:
            raise InputError(f"{path}, line {number} has {len(line)} characters; a prompt has at most {limit}")
    prompts = [line for line in rows if line]
    if not prompts:
        raise InputError(f"the prompts file {path} has no prompts; write one per line")
    warn_of_syntax(prompts)
    return prompts


def warn_of_long_prompts(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Warn of prompts that the text encoder truncates, and return them."""
    limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    long = [p for p, n in zip(prompts, lengths, strict=True) if n > limit]
    if long:
        warnings.warn(
            f"{len(long)} of {len(prompts)} prompts have more than {limit} tokens and are truncated "
            f"(the first: {excerpt(long[0])})",
            stacklevel=2,
        )
    return long


@dataclass(frozen=True)
class CaptionedImages:
    """Images that are readable and have a caption.

    Attributes:
        files: the images.
        captions: the caption of each image.
        skipped: ``(file name, reason)`` of each image that was skipped.
    """

    files: list[Path]
    captions: list[str]
    skipped: list[tuple[str, str]]


def find_images(folder: Path) -> CaptionedImages:
    """Find images with captions, from ``metadata.jsonl`` (``file_name``, ``text``) or ``NAME.txt`` beside each image.

    Images that are empty, cannot be decoded or have no caption are skipped, with a warning that lists them.

    Raises:
        InputError: if the folder or a usable image is missing, or ``metadata.jsonl`` is not JSON lines of that form.
    """
    if not is_folder(folder):
        raise InputError(f"the image folder {folder} does not exist; pass a folder of captioned images")
    known = _metadata(folder)
    files, captions, skipped = [], [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        name = str(path.relative_to(folder))
        try:
            read_rgb(path)
            caption = known.get(name) or _caption_beside(path)
        except ImageError as e:
            skipped.append((name, e.reason))
            continue
        except InputError as e:
            skipped.append((name, str(e)))
            continue
        if caption:
            files.append(path)
            captions.append(caption)
        else:
            skipped.append((name, "has no caption"))
    if skipped:
        some = "; ".join(f"{name} ({why})" for name, why in skipped[:LISTED])
        more = f" and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
        warnings.warn(f"{len(skipped)} images of {folder} are skipped: {some}{more}", stacklevel=2)
    if not files:
        raise InputError(
            f"{folder} has no usable image; it needs {', '.join(SUFFIXES)} files with captions in metadata.jsonl "
            "(file_name, text) or in NAME.txt beside each"
        )
    return CaptionedImages(files, captions, skipped)


def _caption_beside(image: Path) -> str:
    """The text of NAME.txt beside an image, joined to one line; empty if there is no such file."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return ""
    return " ".join(read_text(path, "its caption", "save it as UTF-8").split())


def _metadata(folder: Path) -> dict[str, str]:
    """Captions by file name from ``metadata.jsonl``; empty if there is no such file."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    advice = 'each line is a JSON object such as {"file_name": "a.png", "text": "a caption"}'
    captions = {}
    for number, line in enumerate(lines(read_text(path)), 1):
        if not line:
            continue
        row = parse_json(line, f"{path}, line {number}", advice)
        if wrong := problem(row, _METADATA_ROW):
            raise InputError(f"{path}, line {number}: {wrong.replace('the document', 'it')}; {advice}")
        check_prompts([row["text"]], f"{path}, line {number}: the caption")
        captions[row["file_name"]] = " ".join(row["text"].split())
    return captions


def image_latents(vae: Any, files: list[Path], side: int, device: torch.device, batch: int = 16) -> Tensor:
    """Latents ``[N, C, h, w]`` float32, scaled for the U-Net, of images cropped to squares of ``side`` pixels."""
    import torch
    from PIL import Image, ImageOps

    from .latents import from_vae

    vae.to(device)
    out = []
    for start in range(0, len(files), batch):
        rows = []
        for path in files[start : start + batch]:
            square = ImageOps.fit(Image.fromarray(read_rgb(path)), (side, side), Image.Resampling.LANCZOS)
            rows.append(torch.from_numpy(np.asarray(square).copy()))
        x = torch.stack(rows).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(device)
        with torch.no_grad():
            code = vae.encode(x)
        # the mean of the posterior: a random sample would add noise to the teacher's input
        z = code.latents if hasattr(code, "latents") else code.latent_dist.mode()
        out.append(from_vae(z, vae).float().cpu())
    return torch.cat(out)

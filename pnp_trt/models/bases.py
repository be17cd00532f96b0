"""Base models by name: bundled, random, folders, single files and hub ids."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from ..assets import ROOT as ASSETS
from ..errors import InputError
from .catalog import bundled_bases, random_bases
from .families import open_folder
from .files import PICKLES, choose, stem_of
from .teacher import BaseModel


def is_hub_id(name: str) -> bool:
    """Whether ``resolve`` would download this name from the hub.

    True for ``owner/model`` (dots allowed) if no file or folder of this name exists.
    """
    suffixes = (".safetensors", ".json", *PICKLES)
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not name.endswith(suffixes)
    return bool(known) and not Path(name).exists()


def resolve(name: str) -> BaseModel:
    """Return the base model of this name.

    Args:
        name: ``emoji``, a bundled fine-tune, a diffusers folder, a ``.safetensors`` checkpoint of Stable Diffusion 1, 2
            or XL or of a U-Net of the bundled model's shape, a hub id, or a random base such as ``random:sd15``
            (``random:sd15#2`` is a fine-tune of it: its U-Net has another seed, the rest is the same).

    Raises:
        InputError: if the name is unknown; the message lists the known names.
    """
    if name == "emoji":
        return BaseModel(name, ASSETS / "emoji")
    path = Path(name)
    bundled = ASSETS / "fine-tunes" / f"{name}.safetensors"
    if bundled.is_file():
        return BaseModel(name, ASSETS / "emoji", bundled)
    if path.is_dir():
        return open_folder(name, path)
    if path.suffix == ".safetensors" and path.is_file():
        from .single_base import SingleFileBase

        return SingleFileBase.of(path, name)
    if path.suffix in PICKLES and path.is_file():
        raise InputError(f"{path} holds pickled weights, which are not read; save the model as safetensors")
    if name.startswith("random:"):
        from .random import random_base

        return random_base(name)
    if is_hub_id(name):
        return open_folder(name, _from_hub(name))
    known = ", ".join([*bundled_bases(), *random_bases()])
    raise InputError(
        f"no base model '{name}'; known: {known}, a diffusers folder, a .safetensors checkpoint, or a hub id"
    )


def _from_hub(name: str) -> Path:
    """Download a hub model: its configs and only the weights that would be loaded.  Return its folder."""
    try:
        from huggingface_hub import list_repo_files, snapshot_download

        patterns = ["*.json", "*.txt", "*/*.safetensors"]
        with suppress(OSError):  # offline: the cache has the files chosen on download
            patterns = hub_patterns(list_repo_files(name), name)
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except InputError:
        raise
    except Exception as e:
        raise InputError(
            f"the hub model '{name}' cannot be downloaded: {type(e).__name__}; check the name and the network, or "
            f"download it and pass its folder (bundled models: {', '.join(bundled_bases())})"
        ) from e
    return folder


def hub_patterns(names: list[str], model: str) -> list[str]:
    """Patterns of the files of a hub model to download.

    Raises:
        InputError: if a network has no safetensors files.
    """
    patterns = ["*.json", "*.txt"]
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        files = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/") and n.count("/") == 1]
        if files:
            choice = choose(files, stem_of(part), f"{model}/{part}")
            patterns += [f"{part}/{n}" for n in (choice.shards(files) if choice.sharded else [choice.name])]
    return patterns

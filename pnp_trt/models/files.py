"""Files of a model as its user has them: JSON read with care, weight files chosen as diffusers chooses, types checked.

Nothing here imports torch at the top: which file is loaded, its hash and the types in its header are known without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.store import cached_sha256, digest
from ..errors import InputError
from ..io import inputs
from .safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

#: names of weight files by the library that writes them
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
#: what to do about a file of a model that is missing or damaged
FETCH = "download it again, or save the model with pipeline.save_pretrained"
_PICKLED = "pickled weights are not read; save the model with safe_serialization=True"
#: suffixes of files that hold pickled weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: types of safetensors that PyTorch computes in as they are
_FLOATS = ("F32", "F16", "BF16")
#: types that are converted to float32 when they are read
_CONVERTED = ("F64", "F8_E4M3", "F8_E5M2")
#: last parts of the keys under which the scales of scaled fp8 weights are stored
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "scale_input", "input_scale", "weight_scale_inv")
#: last parts of keys that are integers by right
_COUNTS = ("position_ids", "num_batches_tracked")
_VARIANT = r"[A-Za-z0-9_]+"


def read_json(path: Path, how: str = FETCH, *, constants: bool = False) -> dict[str, Any]:
    """The object in a JSON file of a model; a byte order mark and any line ends are accepted.

    Args:
        how: what to do where the file is missing or damaged, for the message.
        constants: take NaN and Infinity as well.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    with suppress(OSError), path.open("rb") as f:
        if (reason := _disguise(f.read(64))) is not None:
            raise InputError(f"{path} {reason}; {how}")
    value = inputs.read_json(path, advice=how, constants=constants)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object; {how}")
    return value


def _disguise(start: bytes) -> str | None:
    """What a file really is that was to be JSON, from its first bytes; None where that cannot be told."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself (run git lfs pull)"
    return "is a web page" if text.startswith(b"<") else None


@dataclass(frozen=True)
class WeightsFile:
    """Which of a folder's names hold a network's weights.

    Attributes:
        name: a safetensors file, or the index of a set of shards.
        variant: ``fp16``, ``non_ema`` and the like; None for the plain weights.
    """

    name: str
    variant: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether ``name`` is an index."""
        return self.name.endswith(".json")

    def shards(self, names: Iterable[str]) -> list[str]:
        """Those of a folder's names that can be shards of this set, told by their names alone."""
        v = rf"\.{re.escape(self.variant)}" if self.variant else ""
        pattern = rf"[A-Za-z_]+(?:{v}-\d+-of-\d+|-\d+-of-\d+{v})\.safetensors"
        return [n for n in sorted(names) if re.fullmatch(pattern, n)]


def choose(names: Iterable[str], stem: str, where: str) -> WeightsFile:
    """The weights that diffusers or transformers would load of a folder's files; of only one variant, that.

    Args:
        names: of all files in the folder.
        stem: ``DIFFUSERS`` or ``TRANSFORMERS``: the library that reads the folder.
        where: the folder, for messages.

    Raises:
        InputError: if there are none, or one cannot tell which of several is meant.
    """
    present = sorted(names)
    for s in dict.fromkeys((stem, DIFFUSERS, TRANSFORMERS)):
        plain = [f"{s}.safetensors.index.json", f"{s}.safetensors"]
        if stem == TRANSFORMERS:
            plain.reverse()  # transformers prefers the whole file, diffusers the index
        if name := next((n for n in plain if n in present), None):
            return WeightsFile(name)
        variants = _variants(present, s)
        if len(variants) == 1:
            return next(iter(variants.values()))
        if variants:
            raise InputError(
                f"{where} holds no {s}.safetensors but the variants {', '.join(variants)}; "
                f"rename the one that is meant to {s}.safetensors, or remove the others"
            )
    return _only(present, where)


def _variants(present: Sequence[str], stem: str) -> dict[str, WeightsFile]:
    """The variants of a network's weights; an index counts before a file of its variant, as in diffusers."""
    s, v = re.escape(stem), rf"(?P<v>{_VARIANT})"
    patterns = (
        rf"{s}\.safetensors\.index\.{v}\.json",
        rf"{s}\.safetensors\.{v}\.index\.json",  # as older versions of diffusers wrote it
        rf"{s}\.{v}\.safetensors\.index\.json",
        rf"{s}\.{v}\.safetensors",
    )
    out: dict[str, WeightsFile] = {}
    for pattern in patterns:
        for name in present:
            if (m := re.fullmatch(pattern, name)) and m["v"] != "index":
                out.setdefault(m["v"], WeightsFile(name, m["v"]))
    return dict(sorted(out.items()))


def _only(present: Sequence[str], where: str) -> WeightsFile:
    """The only safetensors file of a folder, whatever its name."""
    weights = [n for n in present if n.endswith(".safetensors")]
    shards = [n for n in weights if re.search(r"-\d{5}-of-\d{5}", n)]
    if shards:
        raise InputError(
            f"{where} holds shards of weights ({shards[0]} …) without their index, *.safetensors.index.json; {FETCH}"
        )
    if len(weights) == 1:
        return WeightsFile(weights[0])
    if weights:
        raise InputError(
            f"{where} holds {len(weights)} files of weights ({', '.join(weights[:4])}) under names that are not "
            f"diffusers'; rename the one that is meant to {DIFFUSERS}.safetensors"
        )
    if pickles := [n for n in present if n.endswith(PICKLES)]:
        raise InputError(f"{where} holds {pickles[0]} and no .safetensors; {_PICKLED}")
    raise InputError(f"{where} holds no .safetensors; {FETCH}")


def stem_of(folder: str) -> str:
    """The library whose names a network's folder has: transformers for text encoders, else diffusers."""
    return TRANSFORMERS if folder.startswith("text_encoder") else DIFFUSERS


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a network's weights: what diffusers would load.

    Raises:
        InputError: if there are none, a shard is missing, or one cannot tell which of several is meant.
    """
    try:
        names = [p.name for p in folder.iterdir()]
    except OSError as e:
        raise InputError(f"{folder} cannot be read ({e.strerror or e}); {FETCH}") from None
    choice = choose(names, stem_of(folder.name), str(folder))
    if not choice.sharded:
        return [folder / choice.name]
    return [folder / n for n in _shards(folder / choice.name)]


def _shards(index: Path) -> list[str]:
    """The files that an index names, all of them present."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map and is not an index of weights; {FETCH}")
    names = sorted({str(v) for v in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names '{name}', which is not a safetensors file beside it; {FETCH}")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing, a shard that {index.name} names; {FETCH}")
    return names


def files_sha256(files: list[Path]) -> str:
    """Hash of a network's weights: of its only file, or of all shards' hashes."""
    hashes = [cached_sha256(f) for f in files]
    return hashes[0] if len(hashes) == 1 else digest(hashes)


def check_types(file: Path, dtypes: Mapping[str, str]) -> None:
    """Refuse weights of types that are not read.

    Float64 and fp8 without scales are read, and converted to float32.

    Args:
        dtypes: safetensors' names of the types, by key, of what is read of the file.

    Raises:
        InputError: for scaled fp8, integers where weights belong, or a type that is unknown.
    """
    if scales := [k for k in dtypes if k.rpartition(".")[2] in _SCALES]:
        kind = "fp8" if any(d.startswith("F8") for d in dtypes.values()) else "quantised"
        raise InputError(
            f"{file} holds scaled {kind} weights ({scales[0]}), whose scales are not applied; "
            "use the model's file in fp16 or fp32"
        )
    for key, dtype in dtypes.items():
        if dtype not in (*_FLOATS, *_CONVERTED) and key.rpartition(".")[2] not in _COUNTS:
            raise InputError(f"{file}: {key} has type {dtype}, not floating point; fetch the full weights")


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files, mapped from the disk in the types that they have there.

    Float64 and fp8 are converted to float32, of which they are rounded or exact values.

    Raises:
        InputError: if a file is damaged or cut short, or holds a type that is not read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in files:
        check_types(file, read_header(file).dtypes)
    out: dict[str, Tensor] = {}
    for file in files:
        try:
            out |= load_file(file)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file} is not a readable safetensors file ({e}); fetch it again") from None
    return {k: computable(v) for k, v in out.items()}


def computable(tensor: Tensor) -> Tensor:
    """A tensor in a type that PyTorch computes in: float64 and fp8 as float32, others as they are."""
    import torch

    kept = (torch.float32, torch.float16, torch.bfloat16)
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in kept else tensor

"""Files of a user's model: JSON read defensively, weight files chosen as diffusers does, types checked.

Importing this does not load torch, which is not needed to choose a file, to hash it or to read the types in its header.
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

#: stems of weight files, by the library that writes them
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
#: advice for a missing or damaged file of a model
FETCH = "download it again, or save the model with pipeline.save_pretrained"
_PICKLED = "pickled weights are not read; save the model with safe_serialization=True"
#: suffixes of files with pickled weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: safetensors types that PyTorch computes in directly
_FLOATS = ("F32", "F16", "BF16")
#: types that are converted to float32 on reading
_CONVERTED = ("F64", "F8_E4M3", "F8_E5M2")
#: last components of the keys of scales of scaled fp8 weights
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "scale_input", "input_scale", "weight_scale_inv")
#: last components of keys of tensors that are legitimately integers
_COUNTS = ("position_ids", "num_batches_tracked")
_VARIANT = r"[A-Za-z0-9_]+"


def read_json(path: Path, how: str = FETCH, *, constants: bool = False) -> dict[str, Any]:
    """Read the object in a model's JSON file; a byte order mark and any line endings are accepted.

    Args:
        how: advice for the message if the file is missing or damaged.
        constants: whether to accept NaN and Infinity as well.

    Raises:
        InputError: if the file is missing or is not such JSON.
    """
    with suppress(OSError), path.open("rb") as f:
        if (reason := _disguise(f.read(64))) is not None:
            raise InputError(f"{path} {reason}; {how}")
    value = inputs.read_json(path, advice=how, constants=constants)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object; {how}")
    return value


def _disguise(start: bytes) -> str | None:
    """Recognise a file that should be JSON but is not, from its first bytes; None if it may be JSON."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself (run git lfs pull)"
    return "is a web page" if text.startswith(b"<") else None


@dataclass(frozen=True)
class WeightsFile:
    """The file in a folder from which a network's weights are loaded.

    Attributes:
        name: a safetensors file, or the index of a set of shards.
        variant: ``fp16``, ``non_ema`` etc.; None for the default weights.
    """

    name: str
    variant: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether ``name`` is an index."""
        return self.name.endswith(".json")

    def shards(self, names: Iterable[str]) -> list[str]:
        """The names in a folder that match the pattern of this set's shards."""
        v = rf"\.{re.escape(self.variant)}" if self.variant else ""
        pattern = rf"[A-Za-z_]+(?:{v}-\d+-of-\d+|-\d+-of-\d+{v})\.safetensors"
        return [n for n in sorted(names) if re.fullmatch(pattern, n)]


def choose(names: Iterable[str], stem: str, where: str) -> WeightsFile:
    """Choose the weights that diffusers or transformers would load from a folder, or its only variant.

    Args:
        names: names of all files in the folder.
        stem: ``DIFFUSERS`` or ``TRANSFORMERS``, by the library that reads the folder.
        where: the folder, for messages.

    Raises:
        InputError: if there are none, or the choice is ambiguous.
    """
    present = sorted(names)
    for s in dict.fromkeys((stem, DIFFUSERS, TRANSFORMERS)):
        plain = [f"{s}.safetensors.index.json", f"{s}.safetensors"]
        if stem == TRANSFORMERS:
            plain.reverse()  # transformers prefers the single file, diffusers the index
        if name := next((n for n in plain if n in present), None):
            return WeightsFile(name)
        variants = _variants(present, s)
        if len(variants) == 1:
            return next(iter(variants.values()))
        if variants:
            raise InputError(
                f"{where} holds no {s}.safetensors but the variants {', '.join(variants)}; "
                f"rename the intended one to {s}.safetensors, or remove the others"
            )
    return _only(present, where)


def _variants(present: Sequence[str], stem: str) -> dict[str, WeightsFile]:
    """The variants of a network's weights; the index of a variant takes precedence over its file, as in diffusers."""
    s, v = re.escape(stem), rf"(?P<v>{_VARIANT})"
    patterns = (
        rf"{s}\.safetensors\.index\.{v}\.json",
        rf"{s}\.safetensors\.{v}\.index\.json",  # from older versions of diffusers
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
    """The only safetensors file in a folder, regardless of its name."""
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
            f"diffusers'; rename the intended one to {DIFFUSERS}.safetensors"
        )
    if pickles := [n for n in present if n.endswith(PICKLES)]:
        raise InputError(f"{where} holds {pickles[0]} and no .safetensors; {_PICKLED}")
    raise InputError(f"{where} holds no .safetensors; {FETCH}")


def stem_of(folder: str) -> str:
    """The stem of the weight files in a network's folder: transformers' for text encoders, else diffusers'."""
    return TRANSFORMERS if folder.startswith("text_encoder") else DIFFUSERS


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a network's weights that diffusers would load.

    Raises:
        InputError: if there are none, a shard is missing, or the choice is ambiguous.
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
    """The shards listed in an index, after checking that all exist."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map and is not an index of weights; {FETCH}")
    names = sorted({str(v) for v in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names '{name}', which is not a safetensors file in its folder; {FETCH}")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing, but {index.name} lists it as a shard; {FETCH}")
    return names


def files_sha256(files: list[Path]) -> str:
    """Hash of a network's weights: that of the file, or of all shards' hashes."""
    hashes = [cached_sha256(f) for f in files]
    return hashes[0] if len(hashes) == 1 else digest(hashes)


def check_types(file: Path, dtypes: Mapping[str, str]) -> None:
    """Refuse weights of unsupported types.

    Float64 and fp8 without scales are accepted, and later converted to float32.

    Args:
        dtypes: safetensors' names of the types of all tensors that are read from the file, by key.

    Raises:
        InputError: for scaled fp8, integers where weights are expected, or an unknown type.
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
    """Read all tensors of some safetensors files, memory-mapped and in their stored types.

    Float64 and fp8 are converted to float32; float64 is rounded, fp8 is exact.

    Raises:
        InputError: if a file is damaged or truncated, or contains an unsupported type.
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
    """Convert float64 and fp8 to float32, which PyTorch computes in; other tensors are returned unchanged."""
    import torch

    supported = (torch.float32, torch.float16, torch.bfloat16)
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in supported else tensor

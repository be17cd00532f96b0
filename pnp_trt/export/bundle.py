"""`pnp-trt build`: base and guide in, a checked bundle out."""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifacts import (
    MANIFEST,
    SCHEMA,
    digest,
    engines_home,
    list_files,
    lock,
    read_manifest,
    sha256,
    whole_folder,
    write_json,
)
from ..errors import InputError, PnpError

BACKENDS = ("onnxruntime",)
PRECISIONS = ("fp32",)
#: largest relative error ‖out − reference‖ / ‖reference‖ that a network may show on its golden inputs
PARITY_LIMIT = {"fp32": 1e-4}
MAX_BATCH = 32
STAGES = ("load", "export U-Net", "export text encoder", "export VAE decoder", "check parity", "write")


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    Attributes:
        base: a base model's name, see ``pnp_trt.models.base.resolve``.
        guide: a guide's name or folder; ``none`` builds the plain teacher; ``auto`` takes the bundled one that fits.
        out: the bundle's folder; None derives a name from the rest under ``engines_home()``.
    """

    base: str = "emoji"
    guide: str = "auto"
    backend: str = "onnxruntime"
    precision: str = "fp32"
    out: Path | None = None

    def folder(self) -> Path:
        """Where the bundle goes."""
        if self.out is not None:
            return self.out
        stem = Path(self.base).stem if self.base.endswith(".safetensors") else Path(self.base).name
        role = (
            "teacher"
            if self.guide == "none"
            else "tiny"
            if self.guide == "auto"
            else Path(self.guide).name.removeprefix(f"{stem}-")
        )
        suffix = "" if self.precision == "fp32" else f"-{self.precision}"
        return engines_home() / f"{stem}-{role}{suffix}"

    def command(self) -> str:
        """The command line that makes this bundle."""
        words = ["pnp-trt", "build", "--base", self.base, "--guide", self.guide, "--backend", self.backend]
        return shlex.join([*words, "--precision", self.precision, "--out", str(self.folder())])


@dataclass(frozen=True)
class Built:
    """What `build` did."""

    folder: Path
    manifest: dict[str, Any]
    cached: bool


def build(spec: BuildSpec, *, force: bool = False, progress: Callable[[str], None] | None = None) -> Built:
    """Export, check and write a bundle; a bundle of the same inputs is returned as it is.

    Args:
        force: build even so, and replace what is there.
        progress: called with the name of each stage (``STAGES``) as it begins.

    Raises:
        InputError: for an unknown base, guide, backend or precision, a guide that does not fit, or an ``out``
            that holds something else.
        PnpError: if a network's parity with PyTorch is past the limit; nothing is written then.
    """
    for name, value, known in (("backend", spec.backend, BACKENDS), ("precision", spec.precision, PRECISIONS)):
        if value not in known:
            raise InputError(f"{name} is '{value}'; known: {', '.join(known)}")
    # the key is made from files alone, so that a cache hit needs neither torch nor the weights in memory
    from ..models.base import resolve

    base = resolve(spec.base)
    guide = _guide_identity(spec)
    key = digest([SCHEMA, __version__, base.fingerprint()["all"], guide, spec.backend, spec.precision])
    folder = spec.folder()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    with lock(folder):
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / MANIFEST).is_file():
                if not force or not (folder / "tokenizer.json").exists():
                    raise InputError(f"{folder} holds something that is not a bundle; choose another --out")
            elif not force:
                found = read_manifest(folder)
                if found.get("key") == key and _intact(folder, found):
                    return Built(folder, found, cached=True)
                raise InputError(
                    f"{folder} holds another bundle (base {found['base']['name']}, guide "
                    f"{(found['guide'] or {}).get('name', 'none')}, {found['precision']}), or a damaged one; "
                    "pass --force to replace it, or choose another --out"
                )
        manifest = _build(spec, base, key, folder, progress or (lambda stage: None))
    return Built(folder, manifest, cached=False)


def _guide_identity(spec: BuildSpec) -> dict[str, str] | None:
    if spec.guide == "none":
        return None
    from ..models.load import guide_folder

    folder = guide_folder(_guide_name(spec))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder} holds no .safetensors; a guide is config.json and safetensors weights")
    return {"name": folder.name, "sha256": digest([sha256(w) for w in weights] + [sha256(folder / "config.json")])}


def _guide_name(spec: BuildSpec) -> str:
    return "emoji-tiny" if spec.guide == "auto" else spec.guide


def _intact(folder: Path, manifest: dict[str, Any]) -> bool:
    files = manifest["files"]
    return all((folder / f).is_file() and (folder / f).stat().st_size == wanted["bytes"] for f, wanted in files.items())


def _build(spec: BuildSpec, base: Any, key: str, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    import torch

    from ..models.base import copy_tokenizer
    from ..models.load import load_guide
    from ..models.student import Student, Teacher
    from .graph import TextEncoder, VaeDecoder, export
    from .lower import for_onnxruntime_cpu
    from .parity import golden_inputs, relative_error

    started = time.monotonic()
    progress("load")
    unet, text, vae = base.unet(), base.text_encoder(), base.vae()
    guided = spec.guide != "none"
    student: Any = Student(unet, load_guide(_guide_name(spec))) if guided else Teacher(unet)
    tokens = {}
    parity: dict[str, float] = {}
    networks: dict[str, Any] = {}
    size = unet.config.sample_size
    shape = (unet.config.in_channels, size, size)
    width = unet.config.cross_attention_dim
    with whole_folder(folder) as work:
        tokens = copy_tokenizer(base, work / "tokenizer.json")
        golden = golden_inputs(shape, tokens["length"], width, int(text.config.vocab_size), guided)
        jobs = {
            "unet": ("export U-Net", student, "sample"),
            "text_encoder": ("export text encoder", TextEncoder(text), "last_hidden_state"),
            "vae_decoder": ("export VAE decoder", VaeDecoder(vae), "sample"),
        }
        for network, (stage, module, output) in jobs.items():
            progress(stage)
            path = work / f"{network}.onnx"
            export(module, golden[network], output if network != "unet" else "prediction", path)
            lowered = for_onnxruntime_cpu(path)
            networks[network] = {
                "file": path.name,
                "inputs": {
                    n: [str(v.dtype).removeprefix("torch."), ["batch", *v.shape[1:]]]
                    for n, v in golden[network].items()
                },
                "lowered": lowered,
            }
        progress("check parity")
        limit = PARITY_LIMIT[spec.precision]
        for network, (_, module, _) in jobs.items():
            with torch.no_grad():
                reference = module(**golden[network]).numpy()
            parity[network] = relative_error(work / f"{network}.onnx", golden[network], reference)
            if not parity[network] <= limit:  # also refuses NaN
                raise PnpError(
                    f"the exported {network} differs from PyTorch by {parity[network]:.2e} (relative), more than the "
                    f"{limit:.0e} that {spec.precision} allows; nothing was written; please report it"
                )
        progress("write")
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        manifest = {
            "schema": SCHEMA,
            "name": folder.name,
            "key": key,
            "base": {"name": spec.base, "sha256": base.fingerprint()},
            "guide": _guide_identity(spec),
            "backend": spec.backend,
            "precision": spec.precision,
            "target": "any CPU or GPU that ONNX Runtime serves",
            "networks": networks,
            "sample": {"channels": shape[0], "height": shape[1], "width": shape[2], "max_batch": MAX_BATCH},
            "image": {"height": shape[1] * factor, "width": shape[2] * factor},
            "tokens": tokens,
            "scheduler": base.scheduler_config(),
            "parity": {"relative_error": parity, "limit": limit, "against": "PyTorch float32, seeded golden inputs"},
            "files": list_files(work),
            "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "onnx", "onnxscript")}
            | {"pnp-trt": __version__},
            "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "build_seconds": round(time.monotonic() - started, 1),
            "rebuild": spec.command(),
        }
        write_json(work / MANIFEST, manifest)
    return manifest

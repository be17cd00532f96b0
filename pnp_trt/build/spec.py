"""A build request: its names and its guide.  Nothing heavy is imported."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import backends
from ..bundle.compile_options import CompileOptions
from ..bundle.store import engines_home
from ..errors import InputError
from ..models.files import read_json
from ..models.identity import guide_name
from ..models.noise import Noise
from ..models.scheduler import base_scheduler, check_distilled, check_samples, scheduler_record
from ..precision.recipes import DEFAULT

if TYPE_CHECKING:
    from ..models.teacher import BaseModel


@dataclass(frozen=True)
class BuildSpec:
    """A build request.

    Attributes:
        base: a base model's name, see ``pnp_trt.models.bases.resolve``.
        guide: a guide's name or folder; ``none`` builds the plain teacher; ``auto`` takes the bundled one that fits.
        out: the bundle's folder; None derives a name from the rest under ``engines_home()``.
        target: GPU to compile for; None takes the backend's default.
        profiles: batches and image sizes to compile for, as ``Profile.parse`` reads them; empty takes the backend's
            default.
        options: for the backend's compiler.
        calibration: the record for ``int8``; None looks for the one of this base and guide.
        image_to_image: whether the bundle gets the VAE's encoder too, for images to begin with.
        unet_only: of a base that is a single file, take the U-Net alone.
        noise: what the user states about the base's prediction type and terminal SNR.
        vae: folder or file of an autoencoder in the place of the base's; None keeps its own.
        tokens: of a prompt, at most: whole chunks of the text encoder's number; None takes one chunk.
    """

    base: str = "emoji"
    guide: str = "auto"
    backend: str = "onnxruntime"
    precision: str = DEFAULT
    out: Path | None = None
    target: str | None = None
    profiles: tuple[str, ...] = ()
    options: CompileOptions = field(default_factory=CompileOptions)
    calibration: Path | None = None
    image_to_image: bool = False
    unet_only: bool = False
    noise: Noise = field(default_factory=Noise)
    vae: Path | None = None
    tokens: int | None = None

    def base_model(self) -> BaseModel:
        """The base, its parts checked; no weights are read.

        Raises:
            InputError: if there is none, or a part of a single file would not be used.
        """
        from ..models.bases import resolve
        from ..models.other_vae import OtherVae
        from ..models.single_base import SingleFileBase

        base = resolve(self.base)
        if isinstance(base, SingleFileBase):
            base.unet_only = self.unet_only
            base.check_parts()
            base.check_noise(self.noise)
        elif self.unet_only:
            raise InputError(f"--unet-only is for a base that is a single .safetensors file, not {self.base}")
        if self.vae is not None:
            base.other_vae = OtherVae.find(self.vae)
        base.check_configs()
        return base

    def folder(self) -> Path:
        """Where the bundle goes."""
        if self.out is not None:
            return self.out
        stem = short_name(self.base)
        role = (
            "teacher"
            if self.guide == "none"
            else "tiny"
            if self.guide == "auto"
            else Path(self.guide).name.removeprefix(f"{stem}-")
        )
        backend = backends.get(self.backend)
        words = [stem, role, "" if self.precision == DEFAULT else self.precision, backend.label]
        if backend.label:
            words.append(backend.resolve_target(self.target, self.precision, self.options))
        return engines_home() / "-".join(w for w in words if w)

    def command(self) -> str:
        """The command line that makes this bundle."""
        words = ["pnp-trt", "build", "--base", self.base, "--guide", self.guide, "--backend", self.backend]
        words += ["--precision", self.precision]
        words += ["--target", self.target] if self.target else []
        for profile in self.profiles:
            words += ["--profile", profile]
        words += ["--calibration", str(self.calibration)] if self.calibration is not None else []
        o = self.options
        words += ["--workspace", f"{o.workspace / 2**30:g}"] if o.workspace is not None else []
        for name in ("refittable", "version_compatible", "hardware_compatible"):
            words += [f"--{name.replace('_', '-')}"] if getattr(o, name) else []
        words += ["--tokens", str(self.tokens)] if self.tokens is not None else []
        words += ["--image-to-image"] if self.image_to_image else []
        words += ["--unet-only"] if self.unet_only else []
        words += self.noise.arguments()
        words += ["--vae", str(self.vae)] if self.vae is not None else []
        return shlex.join([*words, "--out", str(self.folder())])


def short_name(base: str) -> str:
    """A base model's name as bundles' folders have it: ``random-sd15``, ``my-fine-tune``."""
    return Path(base).stem if base.endswith(".safetensors") else Path(base).name.replace(":", "-").replace("#", "-")


def build_scheduler(spec: BuildSpec, base: BaseModel) -> dict[str, Any]:
    """The scheduler record of a build, which can be sampled from and is what the guide was distilled under.

    Raises:
        InputError: if it cannot be sampled from, or the guide was distilled under another one.
    """
    from ..models.catalog import guide_config, guide_folder

    spec.noise.check()
    record = scheduler_record(base_scheduler(base), Noise(), spec.noise)
    if spec.guide == "none" or base.random_guide(spec.guide) is not None:
        check_samples(record, spec.base)
        return record
    folder = guide_folder(guide_name(spec.guide))
    steps = guide_config(folder).get("sampling_steps")
    check_samples(record, spec.base, steps)
    if (guide := distilled_under(folder)) is not None:
        check_distilled(guide, record, f"guide '{folder.name}'", spec.base, steps)
    return record


def distilled_under(folder: Path) -> dict[str, Any] | None:
    """The scheduler that a guide was distilled under; None where that is not known.

    It is what ``distill.json`` records, or else the scheduler of the base that it names, where that is on this machine.
    """
    from ..models.bases import resolve
    from ..models.catalog import bundled_bases

    try:
        report = read_json(folder / "distill.json")
        recorded = report.get("scheduler")
        if isinstance(recorded, dict):
            return recorded
        name = str(report["settings"]["base"])
    except (InputError, KeyError, TypeError):
        return None
    if name not in bundled_bases() and not Path(name).exists():
        return None  # a hub id: nothing is downloaded for a check
    try:
        return base_scheduler(resolve(name))
    except InputError:
        return None

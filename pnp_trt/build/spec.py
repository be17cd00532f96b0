"""A build request.  No heavy imports."""

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
        guide: a guide's name or folder; ``none`` builds the plain teacher; ``auto`` takes the matching bundled guide.
        out: the bundle's folder; None derives a name under ``engines_home()`` from the other attributes.
        target: GPU to compile for; None takes the backend's default.
        profiles: batch and image sizes to compile for, in the form of ``Profile.parse``; empty takes the backend's
            default.
        options: options for the backend's compiler.
        calibration: the calibration record for ``int8``; None looks for the record of this base and guide.
        image_to_image: include the VAE's encoder in the bundle, for initial images.
        unet_only: take only the U-Net of a base that is a single file.
        noise: user-supplied prediction type and terminal SNR of the base.
        vae: folder or file of an autoencoder that replaces the base's; None keeps the base's.
        tokens: largest number of tokens of a prompt, a multiple of the text encoder's chunk length; None for one chunk.
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
        """Resolve the base and check its parts; no weights are read.

        Raises:
            InputError: if the base does not exist, or a part of a single file would not be used.
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
        """The bundle's folder."""
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
        """The command line that builds this bundle."""
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
    """A base model's name in names of bundle folders: ``random-sd15``, ``my-fine-tune``."""
    return Path(base).stem if base.endswith(".safetensors") else Path(base).name.replace(":", "-").replace("#", "-")


def build_scheduler(spec: BuildSpec, base: BaseModel) -> dict[str, Any]:
    """The scheduler record of a build, checked for sampling and against the scheduler of the guide's distillation.

    Raises:
        InputError: if it cannot be used for sampling, or the guide was distilled with a different scheduler.
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
    """The scheduler that a guide was distilled with; None if unknown.

    It is recorded in ``distill.json``; otherwise it is the scheduler of the base named there, if that is available
    locally.
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
        return None  # a hub id: a check downloads nothing
    try:
        return base_scheduler(resolve(name))
    except InputError:
        return None

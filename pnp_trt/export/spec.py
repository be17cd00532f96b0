"""What to build: the request, its names, and the guide that it means.  Nothing heavy is imported."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import backends
from ..artifacts import cached_sha256, digest, engines_home
from ..backends.base import CompileOptions
from ..errors import InputError


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    Attributes:
        base: a base model's name, see ``pnp_trt.models.base.resolve``.
        guide: a guide's name or folder; ``none`` builds the plain teacher; ``auto`` takes the bundled one that fits.
        out: the bundle's folder; None derives a name from the rest under ``engines_home()``.
        target: GPU to compile for; None takes the backend's default.
        profiles: batches and picture sizes to compile for, as ``Profile.parse`` reads them; empty takes the backend's
            default.
        options: for the backend's compiler.
        calibration: the record for ``int8``; None looks for the one of this base and guide.
        image_to_image: whether the bundle gets the VAE's encoder too, for pictures to begin with.
    """

    base: str = "emoji"
    guide: str = "auto"
    backend: str = "onnxruntime"
    precision: str = "fp32"
    out: Path | None = None
    target: str | None = None
    profiles: tuple[str, ...] = ()
    options: CompileOptions = field(default_factory=CompileOptions)
    calibration: Path | None = None
    image_to_image: bool = False

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
        words = [stem, role, "" if self.precision == "fp32" else self.precision, backend.label]
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
        words += ["--image-to-image"] if self.image_to_image else []
        return shlex.join([*words, "--out", str(self.folder())])


def short_name(base: str) -> str:
    """A base model's name as bundles' folders have it: ``random-sd15``, ``my-fine-tune``."""
    return Path(base).stem if base.endswith(".safetensors") else Path(base).name.replace(":", "-").replace("#", "-")


def guide_identity(spec: BuildSpec) -> dict[str, Any] | None:
    """What identifies the guide: name, hash of config and weights, and what a sampler has to know of it; None without.

    Raises:
        InputError: if there is no such guide.
    """
    if spec.guide == "none":
        return None
    from ..models.base import resolve
    from ..models.names import guide_folder

    if (made := resolve(spec.base).random_guide(spec.guide)) is not None:
        return made
    folder = guide_folder(guide_name(spec))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder} holds no .safetensors; a guide is config.json and safetensors weights")
    files = [*weights, folder / "config.json"]
    config = json.loads((folder / "config.json").read_text())
    return {
        "name": folder.name,
        "sha256": digest([cached_sha256(f) for f in files]),
        # the sampler has to know both: whether there is one more input, and the only step count it was distilled for
        "negative_prompts": bool(config.get("negative_prompts")),
        "sampling_steps": config.get("sampling_steps"),
    }


def guide_name(spec: BuildSpec) -> str:
    """The guide that a build takes, ``auto`` resolved."""
    return "emoji-tiny" if spec.guide == "auto" else spec.guide

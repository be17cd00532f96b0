"""`pnp-trt build`: turn a base model and a guide into a checked bundle.

The networks are processed one at a time: each is loaded, run for its reference output, converted, exported, compared
and freed.  Each is then compiled in a separate process, if the backend compiles.  Heavy imports are deferred until a
bundle must be built, so that finding an up-to-date bundle takes a fraction of a second.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import backends
from ..backends.base import MAX_BATCH, Backend, Profile, Progress
from ..bundle.manifest import Manifest
from ..bundle.store import MANIFEST, SCHEMA, digest, lock, read_manifest
from ..errors import InputError, PnpError
from ..io.files import check_replaceable_folder, failure, is_temporary
from ..io.replacing import check_removable_bundle
from ..models.identity import guide_identity
from ..precision.int8.record import Record
from ..precision.int8.record import find as find_record
from ..precision.recipes import RECIPES, Recipe
from ..precision.recipes import recipe as find_recipe
from ..version import __version__
from .sizes import plan_sizes
from .spec import BuildSpec, build_scheduler
from .work import Build


@dataclass(frozen=True)
class Built:
    """Result of `build`."""

    folder: Path
    manifest: Manifest
    cached: bool


def build(spec: BuildSpec, *, force: bool = False, progress: Progress | None = None) -> Built:
    """Export, compile, check and write a bundle, or return an existing bundle of the same inputs.

    Args:
        force: rebuild, and replace an existing bundle.
        progress: called with (stage, hundredths done, total hundredths).

    Raises:
        InputError: for an unknown base, guide, backend, precision, target or profile, a guide that does not fit the
            base, too little memory, or an ``out`` with other contents.
        PnpError: if a network's error against PyTorch exceeds the limit, or the compiler fails; nothing is written.
    """
    check_before_work(spec.folder())
    backend = backends.get(spec.backend)
    recipe, target, profiles = _checked(spec, backend)
    base = spec.base_model()
    guide = guide_identity(spec.base, spec.guide)
    scheduler = build_scheduler(spec, base)
    record = _record(spec, recipe, base.fingerprint()["all"], guide)
    plan = plan_sizes(profiles, base.sizes())
    plan = plan if backend.profiles else plan.for_any_batch()
    identity: dict[str, Any] = {
        "pnp-trt": __version__,
        "base": base.fingerprint()["all"],
        "configs": base.configs_sha256(),
        "guide": guide,
        "scheduler": scheduler,
        "backend": spec.backend,
        "precision": asdict(recipe),
        "target": target,
        "profiles": [p.as_dict() for p in plan.profiles],
        "options": {k: v for k, v in asdict(spec.options).items() if k != "check_memory"},
        "compiler": backend.versions(),
        **({} if record is None else {"calibration": record.identity()}),
    }
    if spec.image_to_image:
        identity["image_to_image"] = True
    if spec.tokens is not None:
        identity["tokens"] = spec.tokens
    if spec.unet_only:
        identity["unet_only"] = True
    key = digest([SCHEMA, identity])
    folder = spec.folder()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    if not force and (existing := standing(folder, key, identity, force)) is not None:  # needs no write access
        return Built(folder, existing, cached=True)
    check_replaceable_folder(folder)
    with lock(folder):
        if (existing := standing(folder, key, identity, force)) is not None:
            return Built(folder, existing, cached=True)
        base.check()
        if parts := base.left_out():
            warnings.warn(f"{spec.base} has {', '.join(parts)}, which a bundle cannot contain; ignored", stacklevel=2)
        work = Build(spec, base, scheduler, backend, recipe, target, plan, progress or (lambda *_: None), record)
        try:
            manifest = work.run(folder, key, identity)
        except OSError as e:
            raise PnpError(failure(folder, e)) from e
    return Built(folder, manifest, cached=False)


def check_before_work(folder: Path) -> None:
    """Refuse a folder that cannot be written, unless it has a bundle, which may be up to date."""
    try:
        present = (folder / MANIFEST).is_file()
    except (OSError, ValueError):
        present = False
    if not present:
        check_replaceable_folder(folder)


def standing(folder: Path, key: str, identity: dict[str, Any], force: bool) -> Manifest | None:
    """Return the manifest of the bundle in ``folder`` if its key is ``key``; None if a bundle must be built.

    Call it under ``lock(folder)`` before replacing the folder.

    Raises:
        InputError: if the folder has other contents that may not be replaced (``force`` is false).
    """
    if not folder.is_dir() or all(is_temporary(path.name) for path in folder.iterdir()):
        return None
    if force or not (folder / MANIFEST).is_file():
        check_removable_bundle(folder)
    if not (folder / MANIFEST).is_file():
        if not force:
            raise InputError(
                f"{folder} contains a partial or damaged bundle; pass --force to replace it, or choose another --out"
            )
    elif not force:
        manifest = read_manifest(folder)
        if manifest.key == key and _intact(folder, manifest):
            return manifest
        raise InputError(
            f"{folder} contains a different or damaged bundle ({_first_difference(manifest, identity)}); "
            "pass --force to replace it, or choose another --out"
        )
    return None


def _checked(spec: BuildSpec, backend: Backend) -> tuple[Recipe, str, tuple[Profile, ...]]:
    """Recipe, target and profiles, checked against what the backend supports."""
    recipe = find_recipe(spec.precision)
    if recipe.name not in backend.precisions:
        raise InputError(
            f"backend '{backend.name}' does not support {recipe.name}; it supports: {', '.join(backend.precisions)}"
        )
    target = backend.resolve_target(spec.target, recipe.name, spec.options)
    profiles = tuple(Profile.parse(p) for p in spec.profiles or backend.profiles)
    recipe = recipe.on_backend(find_recipe(backend.beside_int8), backend.int8_one_scale)
    if spec.calibration is not None and not recipe.needs_record:
        supporting = " or ".join(name for name, other in RECIPES.items() if other.needs_record)
        raise InputError(f"--calibration is for --precision {supporting}, not {recipe.name}; omit it")
    if spec.tokens is not None and not backend.open_tokens:
        supporting = ", ".join(name for name in backends.BACKENDS if backends.get(name).open_tokens)
        raise InputError(
            f"backend '{backend.name}' supports prompts of one chunk only; omit --tokens, or use --backend {supporting}"
        )
    if profiles and not backend.profiles and not any(p.sized for p in profiles):
        raise InputError(
            f"backend '{backend.name}' takes any batch size up to {MAX_BATCH}; omit --profile, "
            "or add an image size to it, such as b1@512x768"
        )
    return recipe, target, profiles


def _record(spec: BuildSpec, recipe: Recipe, base: str, guide: dict[str, Any] | None) -> Record | None:
    """The calibration record that the recipe needs, for this guide and, unless its file was named, for this base."""
    if not recipe.needs_record:
        return None
    path = spec.calibration or find_record(spec.base, "teacher" if guide is None else str(guide["name"]))
    record = Record.read(path)
    named = spec.calibration is not None  # a fine-tune may use its base's ranges; parity decides whether they fit
    for what, recorded, expected in (
        ("base", record.base["sha256"], record.base["sha256"] if named else base),
        ("guide", (record.guide or {}).get("sha256"), (guide or {}).get("sha256")),
    ):
        if recorded != expected:
            raise InputError(
                f"{path} was recorded with another {what} (sha256 {str(recorded)[:12]}…, not {str(expected)[:12]}…); "
                f"record it again with: pnp-trt calibrate --base {spec.base} --guide {spec.guide} --force"
            )
    return record


def _intact(folder: Path, manifest: Manifest) -> bool:
    files = manifest.files.items()
    return all((folder / name).is_file() and (folder / name).stat().st_size == record.size for name, record in files)


def _first_difference(manifest: Manifest, identity: dict[str, Any]) -> str:
    if ("plugged" in manifest.built_from) != ("plugged" in identity):
        return "it was plugged, not built" if "plugged" in manifest.built_from else "it was built, not plugged"
    for name, expected in identity.items():
        actual = manifest.built_from.get(name)
        if actual != expected:
            shown = [str(v)[:60] if not isinstance(v, dict) else str(v.get("name", v))[:60] for v in (actual, expected)]
            return f"its {name} is {shown[0]}, not {shown[1]}"
    return "files are missing or truncated"

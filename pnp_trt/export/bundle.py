"""`pnp-trt build`: base and guide in, a checked bundle out.

One network after the other is loaded, run for its reference, converted, exported and compared, and let go again;
then each is compiled, where the backend compiles at all, in a process of its own.  Nothing heavy is imported until a
bundle must really be built, so that finding it up to date costs a fraction of a second.
"""

from __future__ import annotations

import datetime
import gc
import json
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__, backends, memory
from ..artifacts import (
    MANIFEST,
    SCHEMA,
    cached_sha256,
    digest,
    engines_home,
    list_files,
    lock,
    read_manifest,
    whole_folder,
    write_json,
    write_manifest,
)
from ..backends.base import MAX_BATCH, Backend, CompileJob, CompileOptions, Profile, Progress, Size
from ..errors import InputError, PnpError
from ..quantize.record import Record
from ..quantize.record import find as find_record
from .precision import Int8, Recipe
from .precision import recipe as find_recipe
from .sizes import SizePlan, plan_sizes

if TYPE_CHECKING:
    from .weights import WeightMap

#: distributions that a manifest remembers, for the reader alone
_REMEMBERED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime")
OUTPUTS = {
    "condition": "condition",
    "unet": "prediction",
    "text_encoder": "last_hidden_state",
    "vae_decoder": "sample",
    "vae_encoder": "latents",
}
TITLES = {
    "condition": "guide's condition",
    "unet": "U-Net",
    "text_encoder": "text encoder",
    "vae_decoder": "VAE decoder",
    "vae_encoder": "VAE encoder",
}


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


@dataclass(frozen=True)
class Built:
    """What `build` did."""

    folder: Path
    manifest: dict[str, Any]
    cached: bool


def build(spec: BuildSpec, *, force: bool = False, progress: Progress | None = None) -> Built:
    """Export, compile, check and write a bundle; a bundle of the same inputs is returned as it is.

    Args:
        force: build even so, and replace what is there.
        progress: called with (stage, hundredths done, hundredths in all) as the work goes on.

    Raises:
        InputError: for an unknown base, guide, backend, precision, target or profile, a guide that does not fit, too
            little memory, or an ``out`` that holds something else.
        PnpError: if a network's parity with PyTorch is past the limit, or the compiler fails; nothing is written.
    """
    backend = backends.get(spec.backend)
    recipe, target, profiles = _checked(spec, backend)
    from ..models.base import resolve

    base = resolve(spec.base)
    guide = guide_identity(spec)
    record = _record(spec, recipe, base.fingerprint()["all"], guide)
    plan = plan_sizes(profiles, base.sizes())
    plan = plan if backend.profiles else plan.for_any_batch()
    if spec.image_to_image and plan.open_axes:
        raise InputError(
            f"image to image wants one size, and the profiles {', '.join(spec.profiles)} have several; name one"
        )
    identity: dict[str, Any] = {
        "pnp-trt": __version__,
        "base": base.fingerprint()["all"],
        "guide": guide,
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
    key = digest([SCHEMA, identity])
    folder = spec.folder()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    with lock(folder):
        if (found := standing(folder, key, identity, force)) is not None:
            return Built(folder, found, cached=True)
        work = _Work(spec, base, backend, recipe, target, plan, progress or (lambda *_: None), record)
        try:
            manifest = work.run(folder, key, identity)
        except OSError as e:
            raise PnpError(
                f"{folder} could not be made ({e.strerror or e}); nothing was written; "
                "free some space, or choose another --out"
            ) from e
    return Built(folder, manifest, cached=False)


def standing(folder: Path, key: str, identity: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The manifest of the bundle of this key that is already in ``folder``; None if one is to be made.

    Call it under ``lock(folder)``.

    Raises:
        InputError: if something else is there, and ``force`` does not say that it may be replaced.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / MANIFEST).is_file():
        if not force or not (folder / "tokenizer.json").exists():
            raise InputError(f"{folder} holds something that is not a bundle; choose another --out")
    elif not force:
        found = read_manifest(folder)
        if found.get("key") == key and _intact(folder, found):
            return found
        raise InputError(
            f"{folder} holds another bundle, or a damaged one ({_first_difference(found, identity)}); "
            "pass --force to replace it, or choose another --out"
        )
    return None


def _checked(spec: BuildSpec, backend: Backend) -> tuple[Recipe, str, tuple[Profile, ...]]:
    """Recipe, target and profiles, all within what the backend takes."""
    recipe = find_recipe(spec.precision)
    if recipe.name not in backend.precisions:
        raise InputError(
            f"backend '{backend.name}' does not run {recipe.name}; it runs: {', '.join(backend.precisions)}"
        )
    target = backend.resolve_target(spec.target, recipe.name, spec.options)
    profiles = tuple(Profile.parse(p) for p in spec.profiles or backend.profiles)
    if isinstance(recipe, Int8):  # what is not quantised is in the type that the backend is quick in
        beside = find_recipe(backend.beside_int8)
        recipe = replace(recipe, beside=beside.name, dtype=beside.dtype)
    if spec.calibration is not None and not (isinstance(recipe, Int8) and recipe.calibrated):
        raise InputError(f"--calibration is for --precision int8, not {recipe.name}; leave it out")
    if profiles and not backend.profiles and not any(p.sized for p in profiles):
        raise InputError(
            f"backend '{backend.name}' takes any batch up to {MAX_BATCH}; leave --profile out, "
            "or name a size with it, such as b1@512x768"
        )
    return recipe, target, profiles


def _record(spec: BuildSpec, recipe: Recipe, base: str, guide: dict[str, Any] | None) -> Record | None:
    """The calibration record that the recipe wants, made for this guide and, unless it was named, for this base."""
    if not (isinstance(recipe, Int8) and recipe.calibrated):
        return None
    path = spec.calibration or find_record(spec.base, "teacher" if guide is None else str(guide["name"]))
    record = Record.read(path)
    named = spec.calibration is not None  # a fine-tune may borrow its base's ranges; parity is the judge
    for what, found, wanted in (
        ("base", record.base["sha256"], record.base["sha256"] if named else base),
        ("guide", (record.guide or {}).get("sha256"), (guide or {}).get("sha256")),
    ):
        if found != wanted:
            raise InputError(
                f"{path} was recorded with another {what} (sha256 {str(found)[:12]}…, not {str(wanted)[:12]}…); "
                f"make it again with: pnp-trt calibrate --base {spec.base} --guide {spec.guide} --force"
            )
    return record


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


def _intact(folder: Path, manifest: dict[str, Any]) -> bool:
    files = manifest["files"]
    return all((folder / f).is_file() and (folder / f).stat().st_size == wanted["bytes"] for f, wanted in files.items())


def _first_difference(found: dict[str, Any], identity: dict[str, Any]) -> str:
    if ("plugged" in found["built_from"]) != ("plugged" in identity):
        return "it was plugged, not built" if "plugged" in found["built_from"] else "it was built, not plugged"
    for name, wanted in identity.items():
        held = found["built_from"].get(name)
        if held != wanted:
            short = [str(v)[:60] if not isinstance(v, dict) else str(v.get("name", v))[:60] for v in (held, wanted)]
            return f"its {name} is {short[0]}, not {short[1]}"
    return "files are missing or cut short"


@dataclass
class _Work:
    """One build under way."""

    spec: BuildSpec
    base: Any
    backend: Backend
    recipe: Recipe
    target: str
    plan: SizePlan
    progress: Progress
    record: Record | None = None

    def run(self, folder: Path, key: str, identity: dict[str, Any]) -> dict[str, Any]:
        import torch

        from ..models.base import copy_tokenizer
        from ..runtime.verify import FILE as GOLDEN
        from ..runtime.verify import save_golden
        from .parity import golden_inputs
        from .weights import FILE as WEIGHTS
        from .weights import SCHEMA as WEIGHTS_SCHEMA

        started = time.monotonic()
        modules = self._modules()
        stages = len(modules) * 2 + 2
        with whole_folder(folder) as work:
            self._stage("load", 0, stages)
            tokens = copy_tokenizer(self.base, work / "tokenizer.json")
            sizes = self.base.sizes()
            negative = bool((identity["guide"] or {}).get("negative_prompts"))
            # by picture size: the default's, then another one where there is more than one
            golden = {
                size: golden_inputs(
                    self.plan.latent(size), tokens["length"], sizes.text_width, sizes.vocabulary, self._guided,
                    negative, size if self.spec.image_to_image else None,
                )
                for size in (self.plan.default, self.plan.second)
                if size is not None
            }  # fmt: skip
            networks: dict[str, dict[str, Any]] = {}
            kept: dict[str, tuple[dict[str, Any], Any]] = {}
            maps: dict[str, Any] = {}
            for i, (name, make) in enumerate(modules.items()):
                self._stage(f"export {TITLES[name]}", 1 + i, stages)
                cases = {size: found[name] for size, found in golden.items()}
                networks[name], references, maps[name] = self._export(name, make, cases, work)
                kept |= references
                if name == "condition":
                    golden[self.plan.default]["unet"]["condition"] = torch.from_numpy(kept[name][1])
            exported = memory.peak()
            gc.collect()
            for i, name in enumerate(modules):
                self._compile(name, networks[name], work, (1 + len(modules) + i, stages))
            self._stage("compare and write", stages - 1, stages)
            save_golden(work / GOLDEN, kept)
            write_json(work / WEIGHTS, {"schema": WEIGHTS_SCHEMA, "networks": maps})
            engines = engine_parity(self.backend, self.target, work, networks, kept, self.spec.folder().name)
            compiled = [n["compiled"]["peak_memory"] for n in networks.values() if n["compiled"]["peak_memory"]]
            manifest = {
                "schema": SCHEMA,
                "name": folder.name,
                "key": key,
                "built_from": identity,
                "base": {"name": self.spec.base, "sha256": self.base.fingerprint()},
                "guide": identity["guide"],
                # what a fine-tune has to be like, and where the guide came from: `pnp-trt plug` needs both
                "given": {"base": self.spec.base, "guide": self.spec.guide},
                "configs": self._configs(),
                "backend": self.backend.name,
                "precision": self.recipe.name,
                "target": self.target,
                "profiles": identity["profiles"],
                "compiler": identity["compiler"],
                "networks": networks,
                "sample": {
                    **dict(zip(("channels", "height", "width"), self.plan.latent(self.plan.default), strict=True)),
                    "max_batch": max((p.maximum for p in self.plan.profiles), default=MAX_BATCH),
                },
                "image": dict(zip(("height", "width"), self.plan.default, strict=True)),
                "tokens": tokens,
                "scheduler": self.base.scheduler_config() | {"_class_name": self.base.scheduler_class()},
                "parity": {
                    "relative_error": {name: n["parity"]["graph"] for name, n in networks.items()},
                    "limit": self.recipe.limit,
                    "against": "PyTorch float32, seeded golden inputs",
                    "engine": engines,
                },
                "files": list_files(work),
                "versions": library_versions(),
                "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "build_seconds": round(time.monotonic() - started, 1),
                "peak_memory": {"export": exported, "compile": max(compiled, default=None)},
                "rebuild": self.spec.command(),
            }
            write_manifest(work, manifest)
        return manifest

    @property
    def _guided(self) -> bool:
        return self.spec.guide != "none"

    def _stage(self, name: str, done: int, stages: int, share: float = 0.0) -> None:
        self.progress(name, int(100 * (done + share)), 100 * stages)

    def _modules(self) -> dict[str, Callable[[], Any]]:
        """What makes each network's module; calling it loads the weights."""
        from ..models.condition import Condition
        from .graph import TextEncoder, VaeDecoder, VaeEncoder

        size = self.plan.latent(self.plan.default)[1:]
        found: dict[str, Callable[[], Any]] = {
            # before the U-Net, which takes what it gives
            **({"condition": lambda: Condition(self._guide(), size)} if self._conditioned else {}),
            "unet": self._student,
            "text_encoder": lambda: TextEncoder(self.base.text_encoder()),
            "vae_decoder": lambda: VaeDecoder(self.base.vae()),
        }
        if self.spec.image_to_image:
            found["vae_encoder"] = lambda: VaeEncoder(self.base.vae())
        return found

    def _student(self) -> Any:
        from ..models.student import Student, Teacher

        unet = self.base.unet()
        if not self._guided:
            return Teacher(unet)
        return Student(unet, self._guide(unet), self._conditioned)

    def _guide(self, unet: Any = None) -> Any:
        """The guide; ``unet`` saves making it again where the base makes its guides for one."""
        from ..models.load import load_guide

        if self.base.guide_class(self.spec.guide) is None:
            return load_guide(guide_name(self.spec))
        return self.base.make_guide(self.spec.guide, self.base.unet() if unet is None else unet)

    @property
    def _conditioned(self) -> bool:
        """Whether what the guide makes of w alone is a network of its own, which runs once a picture.

        It is made for one size of latents, so a graph of several keeps it inside.
        """
        from ..models.load import guide_class

        if not self._guided or self.plan.open_axes:
            return False
        kind = self.base.guide_class(self.spec.guide) or guide_class(guide_name(self.spec))
        return bool(kind.constant_parts)

    def _export(
        self, name: str, make: Callable[[], Any], cases: dict[Size, dict[str, Any]], work: Path
    ) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], Any]], dict[str, Any]]:
        """One network written: its entry in the manifest, its golden inputs and outputs, and its weights' map."""
        from . import modules
        from .graph import export
        from .parity import LARGE, relative_error
        from .precision import convert, reference
        from .weights import check_complete

        path = work / f"{name}.onnx"
        module = make()
        rows = 1 if sum(p.numel() for p in module.parameters()) > LARGE else 2
        inputs = next(iter(cases.values()))
        if name == "text_encoder":
            cases = {self.plan.default: inputs}  # prompts have no size
        compared = {size: {k: v[:rows] for k, v in case.items()} for size, case in cases.items()}
        wanted = {size: reference(module, case).numpy() for size, case in compared.items()}
        traced = {k: self.plan.traced(v) for k, v in inputs.items()}
        recipes = self._recipes(name)
        tried: list[str] = []
        for recipe in recipes:
            module = make() if module is None else module
            quantised = None
            if self.backend.takes_modules:
                path = work / f"{name}.json"
                weights = modules.save(convert(module, recipe), path)
                measure = partial(modules.relative_error, module)
            else:
                weights = export(convert(module, recipe), traced, OUTPUTS[name], path, self.plan.open_axes)
                module = None  # rounded in place, and large
                gc.collect()
                quantised = self._quantize(recipe, path, weights)
                weights = quantised or weights
                weights = weights.derive(self.backend.prepare(path), _initializers(path))
                check_complete(path, weights)
                measure = partial(relative_error, path)
            errors = {f"{h}x{w}": measure(compared[h, w], wanted[h, w]) for h, w in cases}
            error = float(np.max(list(errors.values())))  # NaN if any is
            module = None
            if error <= recipe.limit:  # also refuses NaN
                break
            tried.append(f"{error:.2e} in {recipe.name}, where {recipe.limit:.0e} is allowed")
        else:
            found = _what_is_off(path, next(iter(compared.values())), recipe.limit)
            raise PnpError(
                f"the exported {name} differs from PyTorch by {', and '.join(tried)} (relative); {found}"
                "nothing was written; choose another --precision, or report it"
            )
        entry: dict[str, Any] = {
            "graph": path.name,
            "precision": recipe.name,
            "inputs": {n: [str(v.dtype).removeprefix("torch."), self.plan.named(v.shape)] for n, v in inputs.items()},
            "outputs": {OUTPUTS[name]: ["float32", self.plan.named(wanted[self.plan.default].shape)]},
            "parity": {"graph": error, "limit": recipe.limit, "rows": rows},
        }
        if len(errors) > 1:
            entry["parity"]["sizes"] = errors
        if tried:
            entry["fallback"] = f"off by {tried[0]}"
        if quantised is not None:
            entry["int8"] = self._told(weights)
        references = {
            name if size == self.plan.default else f"{name}@{size[0]}x{size[1]}": (
                {k: v.numpy() for k, v in case.items()},
                wanted[size],
            )
            for size, case in compared.items()
        }
        return entry, references, weights.as_dict()

    def _recipes(self, name: str) -> list[Recipe]:
        """What a network is exported in, and what is tried when that is too far off."""
        first = self.recipe
        if isinstance(first, Int8) and name not in first.networks:
            first = find_recipe(first.beside)
        return [first, *([find_recipe("fp32")] if name in first.fallback else [])]

    def _quantize(self, recipe: Recipe, path: Path, weights: WeightMap) -> WeightMap | None:
        """Bring the INT8 into a graph; its new map, or None where the recipe has none."""
        from .quantize import matrix_layers, quantize_graph, quantize_weights

        if not isinstance(recipe, Int8):
            return None
        if self.record is not None:
            derived = quantize_graph(path, weights, self.record.choices())
        else:
            derived = quantize_weights(path, weights, matrix_layers(path, weights))
        return weights.derive(derived, _initializers(path))

    def _told(self, weights: WeightMap) -> dict[str, Any]:
        """What the manifest says of a quantised network."""
        layers = sum(w["transform"][-1]["op"] == "quantize" for w in weights.weights.values())
        if self.record is None:
            return {"layers": layers, "activations": False}
        sweep = self.record.sweep
        return {
            "layers": layers, "activations": True, "share_of_macs": round(self.record.share(), 4),
            "decision": self.record.decision, "kept": sweep.get("kept"), "latent_error": sweep.get("latent_error"),
            "recorded_on": self.record.settings, "base_sha256": self.record.base["sha256"],
        }  # fmt: skip

    def _compile(self, name: str, entry: dict[str, Any], work: Path, at: tuple[int, int]) -> None:
        def report(phase: str, done: int, total: int) -> None:
            self._stage(f"compile {TITLES[name]}", *at, share=min(1.0, done / max(total, 1)))

        job = CompileJob(
            network=name,
            graph=work / entry["graph"],
            inputs={k: (dtype, tuple(shape)) for k, (dtype, shape) in entry["inputs"].items()},
            precision=entry["precision"],
            target=self.target,
            profiles=self._profiles(name),
            options=self.spec.options,
        )
        made = self.backend.compile(job, report)
        entry |= {
            "file": made.file,
            "profiles": [p.as_dict() for p in job.profiles],
            "compiled": {"seconds": round(made.seconds, 1), "peak_memory": made.peak_memory, **made.notes},
        }

    def _profiles(self, network: str) -> tuple[Profile, ...]:
        if not self.plan.profiles:
            return ()
        if network in ("text_encoder", "vae_encoder"):
            return (Profile("b1", 1, 1, 1),)  # both are run one by one, so that no row depends on another
        profiles = tuple(p.in_latents(self.plan.factor) for p in self.plan.profiles)
        if network == "unet" and not self._guided:
            return tuple(p.doubled() for p in profiles)  # classifier-free guidance is a batch of two
        return profiles

    def _configs(self) -> dict[str, dict[str, Any]]:
        found = {n: self.base.config(n) for n in ("unet", "text_encoder", "vae")}
        if self._guided and self.base.random_guide(self.spec.guide) is None:
            from ..models.names import guide_folder

            found["guide"] = json.loads((guide_folder(guide_name(self.spec)) / "config.json").read_text())
        return found


def engine_parity(
    backend: Backend,
    target: str,
    folder: Path,
    networks: dict[str, Any],
    golden: dict[str, tuple[dict[str, Any], Any]],
    name: str,
) -> dict[str, float] | str:
    """Errors of compiled engines on their golden inputs, or why there are none.

    Args:
        networks: the manifest's; those that ``golden`` has are compared.
        name: of the bundle, for the message.

    Raises:
        PnpError: for the first engine that is further off than its recipe allows.
    """
    from ..runtime.verify import compare, gate

    if all(n["file"] == n["graph"] for n in networks.values()):
        return "the graphs are what runs"
    if reason := backend.cannot_run(target):
        return f"not measured: {reason}; run pnp-trt verify on the machine that serves it"
    errors = compare(backend, folder, networks, golden)
    gate(errors, networks, name)
    return errors


def _what_is_off(path: Path, inputs: dict[str, Any], limit: float) -> str:
    """A clause that names the first bad tensor of a graph; empty where none is found, or it cannot be looked at."""
    from .layers import layerwise, verdict

    if path.suffix != ".onnx":
        return ""
    with suppress(PnpError):
        said, problem = verdict(layerwise(path, {k: v[:1].numpy() for k, v in inputs.items()}), limit)
        return f"{said}; " if problem else ""
    return ""


def _initializers(path: Path) -> list[str]:
    import onnx_ir as ir

    return list(ir.load(path).graph.initializers)


def library_versions() -> dict[str, str]:
    """What a manifest remembers of the libraries that made it, for the reader alone."""
    found = {"pnp-trt": __version__}
    for name in _REMEMBERED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

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
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
from ..backends.base import MAX_BATCH, Backend, CompileJob, CompileOptions, Profile, Progress
from ..errors import InputError, PnpError
from .precision import Recipe
from .precision import recipe as find_recipe

PRECISIONS = ("fp32", "fp16", "bf16")
#: distributions that a manifest remembers, for the reader alone
_REMEMBERED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime")
OUTPUTS = {"condition": "condition", "unet": "prediction", "text_encoder": "last_hidden_state", "vae_decoder": "sample"}
TITLES = {
    "condition": "guide's condition",
    "unet": "U-Net",
    "text_encoder": "text encoder",
    "vae_decoder": "VAE decoder",
}


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    Attributes:
        base: a base model's name, see ``pnp_trt.models.base.resolve``.
        guide: a guide's name or folder; ``none`` builds the plain teacher; ``auto`` takes the bundled one that fits.
        out: the bundle's folder; None derives a name from the rest under ``engines_home()``.
        target: GPU to compile for; None takes the backend's default.
        profiles: batch sizes to compile for, as ``Profile.parse`` reads them; empty takes the backend's default.
        options: for the backend's compiler.
    """

    base: str = "emoji"
    guide: str = "auto"
    backend: str = "onnxruntime"
    precision: str = "fp32"
    out: Path | None = None
    target: str | None = None
    profiles: tuple[str, ...] = ()
    options: CompileOptions = field(default_factory=CompileOptions)

    def folder(self) -> Path:
        """Where the bundle goes."""
        if self.out is not None:
            return self.out
        stem = Path(self.base).stem if self.base.endswith(".safetensors") else Path(self.base).name.replace(":", "-")
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
        o = self.options
        words += ["--workspace", f"{o.workspace / 2**30:g}"] if o.workspace is not None else []
        for name in ("refittable", "version_compatible", "hardware_compatible"):
            words += [f"--{name.replace('_', '-')}"] if getattr(o, name) else []
        return shlex.join([*words, "--out", str(self.folder())])


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
    identity = {
        "pnp-trt": __version__,
        "base": base.fingerprint()["all"],
        "guide": _guide_identity(spec),
        "backend": spec.backend,
        "precision": asdict(recipe),
        "target": target,
        "profiles": [asdict(p) for p in profiles],
        "options": {k: v for k, v in asdict(spec.options).items() if k != "check_memory"},
        "compiler": backend.versions(),
    }
    key = digest([SCHEMA, identity])
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
                    f"{folder} holds another bundle, or a damaged one ({_first_difference(found, identity)}); "
                    "pass --force to replace it, or choose another --out"
                )
        work = _Work(spec, base, backend, recipe, target, profiles, progress or (lambda *_: None))
        try:
            manifest = work.run(folder, key, identity)
        except OSError as e:
            raise PnpError(
                f"{folder} could not be made ({e.strerror or e}); nothing was written; "
                "free some space, or choose another --out"
            ) from e
    return Built(folder, manifest, cached=False)


def _checked(spec: BuildSpec, backend: Backend) -> tuple[Recipe, str, tuple[Profile, ...]]:
    """Recipe, target and profiles, all within what the backend takes."""
    recipe = find_recipe(spec.precision)
    if recipe.name not in backend.precisions:
        raise InputError(
            f"backend '{backend.name}' does not run {recipe.name}; it runs: {', '.join(backend.precisions)}"
        )
    target = backend.resolve_target(spec.target, recipe.name, spec.options)
    if spec.profiles and not backend.profiles:
        raise InputError(f"backend '{backend.name}' takes any batch up to {MAX_BATCH}; leave --profile out")
    profiles = tuple(Profile.parse(p) for p in spec.profiles or backend.profiles)
    return recipe, target, profiles


def _guide_identity(spec: BuildSpec) -> dict[str, Any] | None:
    if spec.guide == "none":
        return None
    from ..models.base import resolve
    from ..models.names import guide_folder

    if (made := resolve(spec.base).random_guide(spec.guide)) is not None:
        return made
    folder = guide_folder(_guide_name(spec))
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


def _guide_name(spec: BuildSpec) -> str:
    return "emoji-tiny" if spec.guide == "auto" else spec.guide


def _intact(folder: Path, manifest: dict[str, Any]) -> bool:
    files = manifest["files"]
    return all((folder / f).is_file() and (folder / f).stat().st_size == wanted["bytes"] for f, wanted in files.items())


def _first_difference(found: dict[str, Any], identity: dict[str, Any]) -> str:
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
    profiles: tuple[Profile, ...]
    progress: Progress

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
            golden = golden_inputs(
                sizes.latent, tokens["length"], sizes.text_width, sizes.vocabulary, self._guided, negative
            )
            networks: dict[str, dict[str, Any]] = {}
            kept: dict[str, tuple[dict[str, Any], Any]] = {}
            maps: dict[str, Any] = {}
            for i, (name, make) in enumerate(modules.items()):
                self._stage(f"export {TITLES[name]}", 1 + i, stages)
                networks[name], kept[name], maps[name] = self._export(name, make, golden[name], work)
                if name == "condition":
                    golden["unet"]["condition"] = torch.from_numpy(kept[name][1])
            exported = memory.peak()
            gc.collect()
            for i, name in enumerate(modules):
                self._compile(name, networks[name], work, (1 + len(modules) + i, stages))
            self._stage("compare and write", stages - 1, stages)
            save_golden(work / GOLDEN, kept)
            write_json(work / WEIGHTS, {"schema": WEIGHTS_SCHEMA, "networks": maps})
            engines = self._engine_parity(work, networks, kept)
            compiled = [n["compiled"]["peak_memory"] for n in networks.values() if n["compiled"]["peak_memory"]]
            manifest = {
                "schema": SCHEMA,
                "name": folder.name,
                "key": key,
                "built_from": identity,
                "base": {"name": self.spec.base, "sha256": self.base.fingerprint()},
                "guide": identity["guide"],
                "backend": self.backend.name,
                "precision": self.recipe.name,
                "target": self.target,
                "profiles": identity["profiles"],
                "compiler": identity["compiler"],
                "networks": networks,
                "sample": {
                    **dict(zip(("channels", "height", "width"), sizes.latent, strict=True)),
                    "max_batch": max((p.maximum for p in self.profiles), default=MAX_BATCH),
                },
                "image": {"height": sizes.latent[1] * sizes.factor, "width": sizes.latent[2] * sizes.factor},
                "tokens": tokens,
                "scheduler": self.base.scheduler_config(),
                "parity": {
                    "relative_error": {name: n["parity"]["graph"] for name, n in networks.items()},
                    "limit": self.recipe.limit,
                    "against": "PyTorch float32, seeded golden inputs",
                    "engine": engines,
                },
                "files": list_files(work),
                "versions": _versions(),
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
        from .graph import TextEncoder, VaeDecoder

        size = self.base.sizes().latent[1:]
        return {
            # before the U-Net, which takes what it gives
            **({"condition": lambda: Condition(self._guide(), size)} if self._conditioned else {}),
            "unet": self._student,
            "text_encoder": lambda: TextEncoder(self.base.text_encoder()),
            "vae_decoder": lambda: VaeDecoder(self.base.vae()),
        }

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
            return load_guide(_guide_name(self.spec))
        return self.base.make_guide(self.spec.guide, self.base.unet() if unet is None else unet)

    @property
    def _conditioned(self) -> bool:
        """Whether what the guide makes of w alone is a network of its own, which runs once a picture."""
        from ..models.load import guide_class

        if not self._guided:
            return False
        kind = self.base.guide_class(self.spec.guide) or guide_class(_guide_name(self.spec))
        return bool(kind.constant_parts)

    def _export(
        self, name: str, make: Callable[[], Any], inputs: dict[str, Any], work: Path
    ) -> tuple[dict[str, Any], tuple[dict[str, Any], Any], dict[str, Any]]:
        """One network written: its entry in the manifest, its golden inputs and output, and its weights' map."""
        from . import modules
        from .graph import export
        from .parity import LARGE, relative_error
        from .precision import convert, reference
        from .weights import WeightMap, check_complete

        path = work / f"{name}.onnx"
        module = make()
        rows = 1 if sum(p.numel() for p in module.parameters()) > LARGE else 2
        compared = {k: v[:rows] for k, v in inputs.items()}
        wanted = reference(module, compared).numpy()
        recipes = [self.recipe, *([find_recipe("fp32")] if name in self.recipe.fallback else [])]
        tried: list[str] = []
        for recipe in recipes:
            module = make() if module is None else module
            if self.backend.takes_modules:
                path = work / f"{name}.json"
                weights = modules.save(convert(module, recipe), path)
                error = modules.relative_error(module, compared, wanted)
                module = None
            else:
                weights = export(convert(module, recipe), inputs, OUTPUTS[name], path)
                module = None  # rounded in place, and large
                gc.collect()
                weights = weights.derive(self.backend.prepare(path), _initializers(path))
                check_complete(path, weights)
                error = relative_error(path, compared, wanted)
            if error <= recipe.limit:  # also refuses NaN
                break
            tried.append(f"{error:.2e} in {recipe.name}, where {recipe.limit:.0e} is allowed")
        else:
            raise PnpError(
                f"the exported {name} differs from PyTorch by {', and '.join(tried)} (relative); "
                f"{_what_is_off(path, compared, recipe.limit)}nothing was written; choose another --precision, or "
                "report it"
            )
        entry = {
            "graph": path.name,
            "precision": recipe.name,
            "inputs": {n: [str(v.dtype).removeprefix("torch."), ["batch", *v.shape[1:]]] for n, v in inputs.items()},
            "outputs": {OUTPUTS[name]: ["float32", ["batch", *wanted.shape[1:]]]},
            "parity": {"graph": error, "limit": recipe.limit, "rows": rows},
        }
        if tried:
            entry["fallback"] = f"off by {tried[0]}"
        assert isinstance(weights, WeightMap)
        return entry, ({k: v.numpy() for k, v in compared.items()}, wanted), weights.as_dict()

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
            "profiles": [asdict(p) for p in job.profiles],
            "compiled": {"seconds": round(made.seconds, 1), "peak_memory": made.peak_memory, **made.notes},
        }

    def _profiles(self, network: str) -> tuple[Profile, ...]:
        if not self.profiles:
            return ()
        if network == "text_encoder":
            return (Profile("b1", 1, 1, 1),)  # prompts are encoded one by one, so that none depends on another
        if network == "unet" and not self._guided:
            return tuple(p.doubled() for p in self.profiles)  # classifier-free guidance is a batch of two
        return self.profiles

    def _engine_parity(
        self, work: Path, networks: dict[str, Any], kept: dict[str, tuple[dict[str, Any], Any]]
    ) -> dict[str, float] | str:
        """Errors of the compiled engines, or why there are none."""
        from ..runtime.verify import compare, gate

        if all(n["file"] == n["graph"] for n in networks.values()):
            return "the graphs are what runs"
        if reason := self.backend.cannot_run(self.target):
            return f"not measured: {reason}; run pnp-trt verify on the machine that serves it"
        errors = compare(self.backend, work, networks, kept)
        gate(errors, networks, self.spec.folder().name)
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


def _versions() -> dict[str, str]:
    found = {"pnp-trt": __version__}
    for name in _REMEMBERED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

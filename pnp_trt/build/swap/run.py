"""`pnp-trt plug`: turn a bundle and a fine-tune into a bundle of the fine-tune.

The graphs do not change, so nothing is traced, optimised or, on ONNX Runtime, compiled: new weights are written to the
places given in ``weights.json``, and everything else is copied.  The new networks are then compared with PyTorch
running the fine-tune on the bundle's golden inputs.  If an error exceeds its limit, nothing is written.
"""

from __future__ import annotations

import gc
import hashlib
import shlex
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ... import backends
from ...backends.base import CompileJob, Progress
from ...bundle import memory
from ...bundle.golden_file import Golden, read_golden, save_golden
from ...bundle.manifest import (
    GOLDEN,
    TEXT_ENCODER,
    WEIGHTS,
    Base,
    CompileRecord,
    FileRecord,
    FurtherText,
    LoraRecord,
    Manifest,
    NetworkRecord,
    PlugRecord,
    Tokens,
    tokenizer_file,
)
from ...bundle.onnx_file import check_graph
from ...bundle.parts import Parts, RunResult, assemble
from ...bundle.store import (
    SCHEMA,
    check_place,
    digest,
    engines_home,
    find_bundle,
    lock,
    read_manifest,
    rebuild_advice,
    sha256,
    whole_folder,
    write_manifest,
)
from ...bundle.weights_file import read_weights
from ...errors import InputError, PnpError
from ...io.files import check_replaceable_folder, failure
from ...io.replacing import check_removable_bundle
from ...io.text import printable
from ...models.bases import is_hub_id
from ...models.families import FAMILIES
from ...models.noise import Noise
from ...models.other_vae import OtherVae
from ...models.scheduler import check_distilled, check_samples
from ...models.specs import TITLES, TextEncoderSpec
from ...precision.recipes import DEFAULT, FP32
from ...precision.recipes import recipe as find_recipe
from ...version import __version__
from ..builder import Built, check_before_work, standing
from ..spec import short_name
from ..work import engine_parity, library_versions
from .checkpoint import FineTune, find
from .lora import Lora

#: network → (its source in weights.json, whether the graph uses all of it); a text encoder is its own source
SOURCES = {"unet": ("unet", True), "vae_decoder": ("vae", False), "vae_encoder": ("vae", False)}
#: temporary folder for files of the engine that are being replaced and must be opened by name
_OLD = ".old"


@dataclass(frozen=True)
class PlugSpec:
    """A plug request.

    Attributes:
        engine: a bundle's name or folder.
        base: the fine-tune, see ``build.swap.checkpoint.find``; None keeps the engine's base, for LoRAs.
        loras: ``FILE`` or ``FILE:scale``, merged in this order.
        out: the new bundle's folder; None derives a name under ``engines_home()`` from the other attributes.
        check_memory: refuse to compile if the host has too little memory.
        unet_only: take only the fine-tune's U-Net.
        noise: user-supplied prediction type and terminal SNR of the fine-tune.
        vae: folder or file of an autoencoder that replaces the engine's and the fine-tune's; without a base and LoRAs,
            only the autoencoder is replaced.
    """

    engine: str
    base: str | None = None
    loras: tuple[str, ...] = ()
    out: Path | None = None
    check_memory: bool = True
    unet_only: bool = False
    noise: Noise = field(default_factory=Noise)
    vae: Path | None = None

    def source(self, manifest: Manifest) -> FineTune:
        """The source of the new weights.

        Raises:
            InputError: if nothing is to be plugged, or a part is missing.
        """
        if self.base is None and not self.loras and self.vae is None:
            raise InputError("nothing to plug: give --base FINE_TUNE, --lora FILE, --vae AUTOENCODER, or several")
        vae = None if self.vae is None else OtherVae.find(self.vae)
        if self.base is not None:
            fine_tune = find(self.base, self.unet_only)
            return fine_tune if vae is None else fine_tune.with_vae(vae)
        base = manifest.base.name
        if not self.loras:
            return FineTune(base, {}, {}).with_vae(vae)
        if is_hub_id(base):  # manifests are untrusted: their base is not downloaded without --base
            raise InputError(
                f"engine '{manifest.name}' names its base '{base}', which is not on this machine; "
                "name it with --base to download it from the hub"
            )
        # with LoRAs only, keep the parts that the engine took from its base, and the engine's autoencoder
        return find(base, self.unet_only or bool(manifest.built_from.get("unet_only"))).with_vae(vae)

    def folder(self, manifest: Manifest, base: str, loras: list[Lora]) -> Path:
        """The new bundle's folder, named like a bundle that `pnp-trt build` builds from that base."""
        if self.out is not None:
            return self.out
        old, guide, backend = manifest.base.name, manifest.guide, backends.get(manifest.backend)
        role = "teacher" if guide is None else guide.name.removeprefix(f"{short_name(old)}-").removeprefix("emoji-")
        precision = "" if manifest.precision == DEFAULT else manifest.precision
        vae = [] if self.vae is None else [short_name(str(self.vae))]
        words = [short_name(base), *(lora.name for lora in loras), *vae, role, precision, backend.label]
        words += [manifest.target] if backend.label else []
        return engines_home() / "-".join(w for w in words if w)

    def command(self, base: str, folder: Path) -> str:
        """The command line that plugs the new bundle."""
        words = ["pnp-trt", "plug", self.engine, *(["--base", base] if self.base is not None else [])]
        for lora in self.loras:
            words += ["--lora", lora]
        words += ["--vae", str(self.vae)] if self.vae is not None else []
        words += ["--unet-only"] if self.unet_only else []
        words += self.noise.arguments()
        return shlex.join([*words, "--out", str(folder)])


def plug(spec: PlugSpec, *, force: bool = False, progress: Progress | None = None) -> Built:
    """Turn a bundle into one of a fine-tune, or return an existing bundle of the same inputs.

    Args:
        force: plug again, and replace an existing bundle.
        progress: called with (stage, hundredths done, total hundredths).

    Raises:
        InputError: for an unknown or damaged engine, fine-tune or LoRA, weights that are missing, left over, of another
            shape or not finite, or an ``out`` with other contents.
        PnpError: if a network's error against PyTorch exceeds the limit, or the compiler fails; nothing is written.
    """
    if spec.out is not None:
        check_before_work(spec.out)
    source = find_bundle(spec.engine)
    manifest = read_manifest(source)
    backend = check_engine(manifest, source)
    base = spec.base or manifest.base.name
    fine_tune = spec.source(manifest)
    scheduler = _checked_scheduler(spec, manifest, fine_tune)
    loras = [Lora.parse(text) for text in spec.loras]
    folder = spec.folder(manifest, base, loras)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    if folder.exists() and folder.samefile(source):
        raise InputError(f"{folder} is the engine itself; choose another --out")
    parts = fine_tune.fingerprint()
    merged = [lora.identity() for lora in loras]
    identity = {
        **{k: v for k, v in manifest.built_from.items() if k not in ("plugged", "unet_only")},
        **({"unet_only": True} if fine_tune.unet_only else {}),
        "pnp-trt": __version__,
        "base": digest([parts, merged]),
        "scheduler": scheduler,
        "plugged": {
            "engine": manifest.key,
            "weights": parts,
            "configs": fine_tune.configs_sha256(),
            "loras": merged,
        },
    }
    key = digest([SCHEMA, identity])
    if not force and (existing := standing(folder, key, identity, force)) is not None:  # needs no write access
        return Built(folder, existing, cached=True)
    check_replaceable_folder(folder)
    with lock(folder):
        if (existing := standing(folder, key, identity, force)) is not None:
            return Built(folder, existing, cached=True)
        assert manifest.configs is not None, "check_engine"
        with _described_wrongly(f"engine '{manifest.name}'", "networks"):
            specs = FAMILIES[manifest.family].model.text_specs
            fine_tune.check_parts(manifest.configs, specs, f"engine '{manifest.name}'")
        work = _Work(spec, source, manifest, backend, fine_tune, scheduler, loras, progress or (lambda *_: None))
        try:
            plugged = work.run(folder, key, identity)
        except OSError as e:
            raise PnpError(failure(folder, e)) from e
    return Built(folder, plugged, cached=False)


def check_engine(manifest: Manifest, folder: Path) -> backends.Backend:
    """Check that a bundle's weights can be replaced on this machine, and return its backend.

    Args:
        folder: the bundle's folder, for the message.

    Raises:
        InputError: if the bundle is too old to be plugged, has no graph, or was compiled by another version.
    """
    advice = rebuild_advice(folder, manifest.rebuild)
    if manifest.configs is None or manifest.given is None:
        raise InputError(f"engine '{manifest.name}' was built before engines could be plugged; {advice}")
    backend = backends.of(manifest)
    if backend.takes_modules:
        raise InputError(
            f"engine '{manifest.name}' contains PyTorch modules and no graph, so plugging would save nothing; "
            f"build the fine-tune instead: pnp-trt build --backend {backend.name} --base FINE_TUNE"
        )
    if (here := backend.versions()) != manifest.compiler:
        raise InputError(
            f"engine '{manifest.name}': it was compiled with {manifest.compiler}, but {here} is installed; {advice}"
        )
    return backend


def _checked_scheduler(spec: PlugSpec, manifest: Manifest, fine_tune: FineTune) -> dict[str, Any]:
    """The new bundle's scheduler record, checked for sampling and for compatibility with the guide."""
    spec.noise.check()
    engine, guide = dict(manifest.scheduler), manifest.guide
    steps = guide.sampling_steps if guide is not None else None
    record = spec.noise.over(engine) if spec.base is None else fine_tune.scheduler(engine, spec.noise)
    check_samples(record, fine_tune.name, steps)
    if guide is not None:
        what = f"guide '{guide.name}' of engine '{manifest.name}'"
        check_distilled(engine, record, what, fine_tune.name, steps)
    return record


@dataclass
class _Work:
    """State of one plug."""

    spec: PlugSpec
    source: Path
    manifest: Manifest
    backend: backends.Backend
    fine_tune: FineTune
    scheduler: dict[str, Any]
    loras: list[Lora]
    progress: Progress
    #: the new bundle's files whose hashes are known
    files: dict[str, FileRecord] = field(default_factory=dict)
    #: the engine's weight files that are replaced, open for reading
    old: dict[str, BinaryIO] = field(default_factory=dict)
    stage: int = 0

    @cached_property
    def specs(self) -> dict[str, TextEncoderSpec]:
        """The engine's text encoders, by network."""
        return {spec.name: spec for spec in FAMILIES[self.manifest.family].model.text_specs}

    def title(self, network: str) -> str:
        """A network's name in messages."""
        return self.specs[network].title if network in self.specs else TITLES[network]

    def run(self, folder: Path, key: str, identity: dict[str, Any]) -> Manifest:
        from .lora import architecture, load

        started = time.monotonic()
        m = self.manifest
        names = architecture(m.configs or {}, self.specs.values()) if self.loras else None
        loaded = [load(lora, names) for lora in self.loras] if names is not None else []
        swapped = self._swapped({network for one in loaded for network in one.changes})
        stages = 2 + 3 * len(swapped)
        with whole_folder(folder, check_removable_bundle) as work, ExitStack() as opened:
            self._report("check the engine", stages)
            self._take(work, swapped, opened)
            tokens = {name: self._tokenizer(name, work) for name in self.specs}
            maps = read_weights(work / WEIGHTS, m.networks, rebuild_advice(self.source, m.rebuild))
            golden = read_golden(work / _OLD / GOLDEN, m.networks)
            networks = dict(m.networks)
            guide = None
            for name in swapped:
                cases = {case: g for case, g in golden.items() if case.partition("@")[0] == name}
                networks[name], outputs, origin = self._swap(
                    name, networks[name], maps[name]["weights"], cases, loaded, work, stages
                )
                golden |= outputs
                guide = guide or origin
                gc.collect()
            checked = memory.peak()
            for name in swapped:
                self._report(f"compile {self.title(name)}", stages)
                networks[name] = self._compile(networks[name], name, work)
            self._report("write", stages)
            save_golden(work / GOLDEN, golden)
            only = {case: g for case, g in golden.items() if case.partition("@")[0] in swapped}
            engines = engine_parity(self.backend, m.target, work, networks, only, folder.name)
            if isinstance(engines, dict) and not isinstance(m.parity.engine, str):
                engines = {**m.parity.engine, **engines}
            shutil.rmtree(work / _OLD)
            hashes = self._hashes(loaded)
            base = self.spec.base or m.base.name
            command = self.spec.command(base, folder)
            plugged = self._plug_record(networks, swapped, guide, command)
            merged = tuple(LoraRecord(entry.name, entry.sha256, entry.scale) for entry in self.loras)
            parts = replace(
                Parts.of(m),
                base=Base(base, hashes, merged if self._swaps_unet else m.base.loras),
                tokens=tokens[TEXT_ENCODER],
                text=self._text(tokens),
                scheduler=self.scheduler,
            )
            result = RunResult(
                name=folder.name, key=key, built_from=identity, networks=networks, engine_parity=engines,
                files=self._files(work), versions=library_versions(), seconds=time.monotonic() - started,
                export_memory=checked, rebuild=command, plugged=plugged, compiled=swapped,
            )  # fmt: skip
            return write_manifest(work, assemble(parts, result))

    def _plug_record(
        self, networks: Mapping[str, NetworkRecord], swapped: Collection[str], guide: str | None, command: str
    ) -> PlugRecord:
        m = self.manifest
        return PlugRecord(
            source={"name": m.name, "key": m.key, "base": m.base.name},
            networks={n: networks[n].compiled.notes["weights"] if n in swapped else "kept" for n in networks},
            guide_read_from=guide or (m.plugged.guide_read_from if m.plugged and not self._swaps_unet else None),
            # the commands that make this bundle from scratch
            commands=(*(m.plugged.commands if m.plugged else (m.rebuild,)), command),
        )

    def _report(self, what: str, stages: int) -> None:
        self.progress(what, 100 * self.stage, 100 * stages)
        self.stage += 1

    @property
    def _swaps_unet(self) -> bool:
        """Whether a fine-tune or a LoRA is plugged, not only an autoencoder."""
        return self.spec.base is not None or bool(self.spec.loras)

    def _swapped(self, by_loras: Collection[str] = ()) -> list[str]:
        """Networks of the bundle whose weights the fine-tune or a LoRA changes."""
        own, engine = self.fine_tune.fingerprint(), self.manifest.base.sha256
        out = ["unet"] if self._swaps_unet else []
        for name in self.specs:
            if own.get(name, engine.get(name)) != engine.get(name) or name in by_loras:
                out.append(name)
        if own.get("vae", engine.get("vae")) != engine.get("vae"):
            out += [n for n in ("vae_decoder", "vae_encoder") if n in self.manifest.networks]
        return out

    def _take(self, work: Path, swapped: list[str], opened: ExitStack) -> None:
        """Copy the files that do not change, open or set aside those that are replaced, and check all of them.

        Another process may replace the engine in the meantime, so later steps read the very files that were checked: a
        copy, or a weight file that is opened only once.  A hard link would also work, but ONNX's libraries refuse to
        load external data that has several links.
        """
        data = {self.manifest.networks[name].data for name in swapped}
        aside = {GOLDEN}
        for name in swapped:
            entry = self.manifest.networks[name]
            aside |= {entry.file} - {entry.graph}
        for relative, record in self.manifest.files.items():
            check_place(self.source, relative, self.manifest.name)
            try:
                if relative in data:
                    file = opened.enter_context((self.source / relative).open("rb"))
                    self.old[relative] = file
                    file_hash = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    target = work / (_OLD if relative in aside else "") / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.source / relative, target)
                    file_hash = sha256(target)
            except FileNotFoundError:
                file_hash = "missing"
            if file_hash != record.sha256:
                raise InputError(
                    f"engine '{self.manifest.name}': {relative} is corrupt (sha256 {file_hash[:12]}…, "
                    f"not {record.sha256[:12]}…); {rebuild_advice(self.source, self.manifest.rebuild)}"
                )
            if relative not in aside | data:
                self.files[relative] = record
        for name in swapped:
            check_graph(work, self.manifest, name)

    def _tokenizer(self, encoder: str, work: Path) -> Tokens:
        """The tokens of a text encoder; a fine-tune that is a complete model replaces the tokenizer."""
        previous = self.manifest.tokens_of(encoder)
        if self.fine_tune.base is None or self.fine_tune.unet_only or encoder not in self._swapped():
            return previous
        from ...models.tokenizer import copy_tokenizer

        file = tokenizer_file(encoder)
        tokens = Tokens(**copy_tokenizer(self.fine_tune.base, self.specs[encoder], work / file))
        self.files.pop(file, None)
        if tokens.length != previous.length:
            raise InputError(
                f"the tokenizer of {self.fine_tune.name} pads to {tokens.length} tokens, but the engine takes "
                f"{previous.length}; build it instead"
            )
        return tokens

    def _text(self, tokens: dict[str, Tokens]) -> FurtherText:
        """The manifest's ``text`` entry; a complete model that is plugged sets ``zero_empty_prompt`` itself."""
        model = self.fine_tune.base if not self.fine_tune.unet_only and self.spec.base is not None else None
        zeros = self.manifest.text.zero_empty_prompt if model is None else model.zero_empty_prompt()
        others = {k: v for k, v in tokens.items() if k != TEXT_ENCODER}
        return FurtherText(others, zeros, self.manifest.text.chunks)

    def _module(
        self, name: str, weights: dict[str, Any], loaded: list[Any], work: Path
    ) -> tuple[Any, Any, str | None, list[Any]]:  # fmt: skip
        """Return a network as PyTorch runs it, the module with the swapped weights, the guide's origin, and rows of
        weights computed with the LoRAs' formula.
        """
        from ...models import wrappers
        from ...models.student import Student, Teacher
        from .guides import guide_of
        from .lora import merge, written

        what = f"engine '{self.manifest.name}'"
        configs = {part: dict(config) for part, config in (self.manifest.configs or {}).items()}
        if name in ("vae_decoder", "vae_encoder"):
            vae = self.fine_tune.vae(configs["vae"], what)
            return (wrappers.VaeDecoder if name == "vae_decoder" else wrappers.VaeEncoder)(vae), vae, None, []
        if name in self.specs:
            text = self._text_encoder(self.specs[name], configs[name], what)
            formula = written.rows(text, name, loaded)
            text = merge(text, name, loaded)
            return getattr(wrappers, self.specs[name].wrapper)(text), text, None, formula
        unet = self.fine_tune.unet(configs["unet"], what)
        formula = written.rows(unet, "unet", loaded)
        unet = merge(unet, "unet", loaded)
        if self.manifest.guide is None:
            return Teacher(unet), unet, None, formula
        graph = self.manifest.networks["unet"].graph
        guide, where = guide_of(self.manifest, work / graph, self.old[f"{graph}.data"], weights, unet)
        # the part of the guide that depends only on w is unchanged, in a separate network
        return Student(unet, guide, conditioned="condition" in self.manifest.networks), unet, where, formula

    def _text_encoder(self, spec: TextEncoderSpec, config: dict[str, Any], what: str) -> Any:
        """The fine-tune's text encoder; the engine's if a LoRA changes it and the fine-tune has none."""
        if spec.name in self.fine_tune.fingerprint():
            return self.fine_tune.text_encoder(spec, config, what)
        assert self.manifest.given is not None, "an engine that is plugged has it"
        names = (self.manifest.base.name, self.manifest.given.base)
        for name in names:
            if is_hub_id(name):  # manifests are untrusted, so nothing is downloaded because of them
                continue
            with suppress(InputError, OSError):
                own = find(name)
                if own.fingerprint().get(spec.name) == self.manifest.base.sha256.get(spec.name):
                    return own.text_encoder(spec, config, what)
        raise InputError(
            f"a LoRA changes the {spec.title}, {self.fine_tune.name} has none, and that of {what} was not found "
            f"at {' or '.join(dict.fromkeys(names))}; pass a fine-tune that is a diffusers folder"
        )

    def _swap(
        self, name: str, entry: NetworkRecord, weights: dict[str, Any], golden: Golden, loaded: list[Any], work: Path,
        stages: int,
    ) -> tuple[NetworkRecord, Golden, str | None]:  # fmt: skip
        """Replace the weights of one network and compare it with PyTorch; return its record, its golden inputs with the
        new outputs by case, and the origin of the guide.
        """
        import torch

        from ...precision.recipes import as_arrays, reference
        from ..parity import realistic_case, relative_error
        from .lora import written as written_weights
        from .rewrite import check_keys, rewrite

        self._report(f"swap {self.title(name)}", stages)
        source, whole = (name, self.specs[name].whole) if name in self.specs else SOURCES[name]
        graph, data = work / entry.graph, entry.data
        inputs = {case: {k: torch.from_numpy(v) for k, v in pair[0].items()} for case, pair in golden.items()}
        with _described_wrongly(f"engine '{self.manifest.name}'", name):
            module, swapped, guide, formula = self._module(name, weights, loaded, work)
            new = {source: dict(swapped.state_dict())}
            check_keys(weights, new, whole)
            written_sha256 = rewrite(graph, self.old[data], work / data, weights, new)
            written_weights.check(graph, weights, source, formula)
            expected = {case: as_arrays(reference(module, arrays)) for case, arrays in inputs.items()}
            hard = []
            if name == "vae_decoder" and find_recipe(entry.precision).dtype != FP32.dtype:
                factor = self.manifest.image.height // self.manifest.sample.height
                hard = [realistic_case(module, next(iter(inputs.values())), factor)]
        self.files[data] = FileRecord(written_sha256, (work / data).stat().st_size)
        del module, swapped, new
        gc.collect()
        self._report(f"compare {self.title(name)}", stages)
        errors = {case: relative_error(graph, inputs[case], expected[case]) for case in inputs}
        all_errors = [*errors.values(), *(relative_error(graph, *case) for case in hard)]
        error, limit = float(np.max(all_errors)), entry.parity.limit  # NaN if any is
        if not error <= limit:  # also refuses NaN
            raise PnpError(
                f"the {name} with the weights of {self.fine_tune.source_of(source)} differs from PyTorch by "
                f"{error:.2e} (relative, limit {limit:.0e} in {entry.precision}); nothing was written; "
                "build it with another --precision, or report it"
            )
        sizes = dict(zip(entry.parity.sizes, errors.values(), strict=True)) if len(errors) > 1 else {}
        entry = replace(entry, parity=replace(entry.parity, graph=error, sizes=sizes))
        return entry, {case: (pair[0], expected[case]) for case, pair in golden.items()}, guide

    def _compile(self, entry: NetworkRecord, name: str, work: Path) -> NetworkRecord:
        job = CompileJob(
            network=name,
            graph=work / entry.graph,
            inputs=entry.inputs,
            precision=entry.precision,
            target=self.manifest.target,
            profiles=entry.profiles,
            options=replace(self.manifest.options, check_memory=self.spec.check_memory),
            tensor_float32=entry.float32_for_range,
        )
        result = self.backend.replace_weights(job, work / _OLD / entry.file, lambda *_: None)
        return replace(entry, compiled=CompileRecord(round(result.seconds, 1), result.peak_memory, result.notes))

    def _hashes(self, loaded: list[Any]) -> dict[str, str]:
        """Hashes of the new bundle's base weights, by network."""
        own = self.manifest.base.sha256
        out = {k: v for k, v in own.items() if k != "all"} | self.fine_tune.fingerprint()
        for network in ("unet", *self.specs):
            if changed := [one.lora.identity() for one in loaded if network in one.changes]:
                changes = [{k: v for k, v in c.items() if k != "name"} for c in changed]
                out[network] = digest([out[network], changes])
        out["all"] = digest(out)
        return out

    def _files(self, work: Path) -> dict[str, FileRecord]:
        """Hash and size of every file; hashes that are known are not computed again."""
        out = dict(self.files)
        present = {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()}
        for name, path in present.items():
            if name not in out:
                out[name] = FileRecord(sha256(path), path.stat().st_size)
        return {name: out[name] for name in sorted(present)}


@contextmanager
def _described_wrongly(what: str, network: str) -> Iterator[None]:
    """Turn errors from wrong configs or weight maps of an untrusted engine, of many types, into ``InputError``."""
    try:
        yield
    except (PnpError, OSError):
        raise
    except Exception as e:
        why = printable(f"{type(e).__name__}: {e}", limit=200)
        raise InputError(
            f"{what}: configs or {WEIGHTS} do not describe the {network} ({why}); build the fine-tune instead"
        ) from e

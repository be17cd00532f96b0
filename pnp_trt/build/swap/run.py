"""`pnp-trt plug`: a bundle and a fine-tune in, a bundle of the fine-tune out.

The graphs stay as they are, so nothing is traced, optimised or, on ONNX Runtime, compiled: a network's new weights go
where ``weights.json`` states, one by one, and what is not swapped is copied.  The new networks are then compared with
PyTorch running the fine-tune, on the bundle's own golden inputs; past the limit nothing is left behind.
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

#: network of the bundle → (its source in weights.json, whether the graph uses all of it); text encoders are their own
SOURCES = {"unet": ("unet", True), "vae_decoder": ("vae", False), "vae_encoder": ("vae", False)}
#: where files of the engine that are about to be replaced, and opened by name, are kept while it is worked on
_OLD = ".old"


@dataclass(frozen=True)
class PlugSpec:
    """What to plug into what.

    Attributes:
        engine: a bundle's name or folder.
        base: the fine-tune, see ``build.swap.checkpoint.find``; None stays with the engine's own base, for LoRAs.
        loras: ``FILE`` or ``FILE:scale`` each, merged in this order.
        out: the new bundle's folder; None derives a name from the rest under ``engines_home()``.
        check_memory: refuse to compile where the host's memory will not do.
        unet_only: take the fine-tune's U-Net alone, whatever else it holds.
        noise: what the user states about the fine-tune's prediction type and terminal SNR.
        vae: folder or file of an autoencoder in the place of the engine's and the fine-tune's; alone, nothing else is
            swapped.
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
        """Where the new weights are.

        Raises:
            InputError: if nothing is to be plugged, or a part of it is not there.
        """
        if self.base is None and not self.loras and self.vae is None:
            raise InputError("nothing to plug: give --base FINE_TUNE, --lora FILE, --vae AUTOENCODER, or several")
        vae = None if self.vae is None else OtherVae.find(self.vae)
        if self.base is not None:
            found = find(self.base, self.unet_only)
            return found if vae is None else found.with_vae(vae)
        own = manifest.base.name
        if not self.loras:
            return FineTune(own, {}, {}).with_vae(vae)
        if is_hub_id(own):  # an engine may come from anyone, and its base is fetched only if asked for
            raise InputError(
                f"engine '{manifest.name}' names its base '{own}', which is not on this machine; "
                "name it too, with --base, to fetch it from the hub"
            )
        # LoRAs alone stay with what the engine took of its own base, and with the autoencoder that it has
        return find(own, self.unet_only or bool(manifest.built_from.get("unet_only"))).with_vae(vae)

    def folder(self, manifest: Manifest, base: str, loras: list[Lora]) -> Path:
        """Where the new bundle goes; named as `pnp-trt build` names one of that base."""
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
        """The command line that makes the new bundle."""
        words = ["pnp-trt", "plug", self.engine, *(["--base", base] if self.base is not None else [])]
        for lora in self.loras:
            words += ["--lora", lora]
        words += ["--vae", str(self.vae)] if self.vae is not None else []
        words += ["--unet-only"] if self.unet_only else []
        words += self.noise.arguments()
        return shlex.join([*words, "--out", str(folder)])


def plug(spec: PlugSpec, *, force: bool = False, progress: Progress | None = None) -> Built:
    """Make a bundle of a fine-tune from a built one; a bundle of the same inputs is returned as it is.

    Args:
        force: plug even so, and replace what is there.
        progress: called with (stage, hundredths done, hundredths in all) as the work proceeds.

    Raises:
        InputError: for an unknown or damaged engine, fine-tune or LoRA, weights that are missing, left over, of another
            shape or not finite, or an ``out`` that holds something else.
        PnpError: if a network's parity with PyTorch is past the limit, or the compiler fails; nothing is written.
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
        raise InputError(f"{folder} is the engine that is plugged; choose another --out")
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
    if not force and (found := standing(folder, key, identity, force)) is not None:  # even where nothing can be written
        return Built(folder, found, cached=True)
    check_replaceable_folder(folder)
    with lock(folder):
        if (found := standing(folder, key, identity, force)) is not None:
            return Built(folder, found, cached=True)
        assert manifest.configs is not None, "check_engine"
        with _described_wrongly(f"engine '{manifest.name}'", "networks"):
            specs = FAMILIES[manifest.family].model.text_specs
            fine_tune.check_parts(manifest.configs, specs, f"engine '{manifest.name}'")
        work = _Work(spec, source, manifest, backend, fine_tune, scheduler, loras, progress or (lambda *_: None))
        try:
            made = work.run(folder, key, identity)
        except OSError as e:
            raise PnpError(failure(folder, e)) from e
    return Built(folder, made, cached=False)


def check_engine(manifest: Manifest, folder: Path) -> backends.Backend:
    """The backend of a bundle whose weights can be replaced here.

    Args:
        folder: of the bundle, for the message.

    Raises:
        InputError: if the bundle is older than plugging, holds no graph, or was compiled by another version.
    """
    advice = rebuild_advice(folder, manifest.rebuild)
    if manifest.configs is None or manifest.given is None:
        raise InputError(f"engine '{manifest.name}' was built before engines could be plugged; {advice}")
    backend = backends.of(manifest)
    if backend.takes_modules:
        raise InputError(
            f"engine '{manifest.name}' holds PyTorch modules and no graph, so there is nothing to save by plugging; "
            f"build it of the fine-tune: pnp-trt build --backend {backend.name} --base FINE_TUNE"
        )
    if (here := backend.versions()) != manifest.compiler:
        raise InputError(f"engine '{manifest.name}': its compiler is {manifest.compiler}, here is {here}; {advice}")
    return backend


def _checked_scheduler(spec: PlugSpec, manifest: Manifest, fine_tune: FineTune) -> dict[str, Any]:
    """The new bundle's scheduler record, which can be sampled from and is what the guide was distilled under."""
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
    """One plug under way."""

    spec: PlugSpec
    source: Path
    manifest: Manifest
    backend: backends.Backend
    fine_tune: FineTune
    scheduler: dict[str, Any]
    loras: list[Lora]
    progress: Progress
    #: hashes of the new bundle's files, as far as they are known already
    files: dict[str, FileRecord] = field(default_factory=dict)
    #: the engine's own files of weights that are replaced, open for reading
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
                mine = {case: g for case, g in golden.items() if case.partition("@")[0] == name}
                networks[name], found, used = self._swap(
                    name, networks[name], maps[name]["weights"], mine, loaded, work, stages
                )
                golden |= found
                guide = guide or used
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
            merged = tuple(LoraRecord(x.name, x.sha256, x.scale) for x in self.loras)
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
            # the commands that make it from nothing
            commands=(*(m.plugged.commands if m.plugged else (m.rebuild,)), command),
        )

    def _report(self, what: str, stages: int) -> None:
        self.progress(what, 100 * self.stage, 100 * stages)
        self.stage += 1

    @property
    def _swaps_unet(self) -> bool:
        """Whether a fine-tune or a LoRA is plugged, and not an autoencoder alone."""
        return self.spec.base is not None or bool(self.spec.loras)

    def _swapped(self, by_loras: Collection[str] = ()) -> list[str]:
        """Networks of the bundle whose weights the fine-tune or a LoRA changes."""
        own, held = self.fine_tune.fingerprint(), self.manifest.base.sha256
        out = ["unet"] if self._swaps_unet else []
        for name in self.specs:
            if own.get(name, held.get(name)) != held.get(name) or name in by_loras:
                out.append(name)
        if own.get("vae", held.get("vae")) != held.get("vae"):
            out += [n for n in ("vae_decoder", "vae_encoder") if n in self.manifest.networks]
        return out

    def _take(self, work: Path, swapped: list[str], opened: ExitStack) -> None:
        """Copy the files that stay, keep those that are replaced at hand, and check every one of them.

        What is checked is what is read later, so another process may replace the engine meanwhile: a file of weights is
        opened once.  A hard link would do too, but ONNX's libraries refuse the engine for as long as it has one.
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
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    target = work / (_OLD if relative in aside else "") / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.source / relative, target)
                    found = sha256(target)
            except FileNotFoundError:
                found = "missing"
            if found != record.sha256:
                raise InputError(
                    f"engine '{self.manifest.name}': {relative} is corrupt (sha256 {found[:12]}…, "
                    f"not {record.sha256[:12]}…); {rebuild_advice(self.source, self.manifest.rebuild)}"
                )
            if relative not in aside | data:
                self.files[relative] = record
        for name in swapped:
            check_graph(work, self.manifest, name)

    def _tokenizer(self, encoder: str, work: Path) -> Tokens:
        """A whole model brings its own tokenizers."""
        held = self.manifest.tokens_of(encoder)
        if self.fine_tune.base is None or self.fine_tune.unet_only or encoder not in self._swapped():
            return held
        from ...models.tokenizer import copy_tokenizer

        file = tokenizer_file(encoder)
        tokens = Tokens(**copy_tokenizer(self.fine_tune.base, self.specs[encoder], work / file))
        self.files.pop(file, None)
        if tokens.length != held.length:
            raise InputError(
                f"the tokenizer of {self.fine_tune.name} pads to {tokens.length} tokens, the engine takes "
                f"{held.length}; build it instead"
            )
        return tokens

    def _text(self, tokens: dict[str, Tokens]) -> FurtherText:
        """What the bundle states of text besides the first encoder's tokens; a whole model has a word on it."""
        whole = self.fine_tune.base if not self.fine_tune.unet_only and self.spec.base is not None else None
        zeros = self.manifest.text.zero_empty_prompt if whole is None else whole.zero_empty_prompt()
        others = {k: v for k, v in tokens.items() if k != TEXT_ENCODER}
        return FurtherText(others, zeros, self.manifest.text.chunks)

    def _module(
        self, name: str, weights: dict[str, Any], loaded: list[Any], work: Path
    ) -> tuple[Any, Any, str | None, list[Any]]:  # fmt: skip
        """A network as PyTorch runs it, the module whose weights are swapped, where the guide came from, and rows of
        weights as the LoRAs' formula gives them.
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
        # the part of the guide that depends on w alone stays as it is, in a separate network
        return Student(unet, guide, conditioned="condition" in self.manifest.networks), unet, where, formula

    def _text_encoder(self, spec: TextEncoderSpec, config: dict[str, Any], what: str) -> Any:
        """The fine-tune's; the engine's own base's where the fine-tune has none and a LoRA changes it."""
        if spec.name in self.fine_tune.fingerprint():
            return self.fine_tune.text_encoder(spec, config, what)
        assert self.manifest.given is not None, "an engine that is plugged has it"
        names = (self.manifest.base.name, self.manifest.given.base)
        for name in names:
            if is_hub_id(name):  # the engine's own word is no reason to fetch anything
                continue
            with suppress(InputError, OSError):
                own = find(name)
                if own.fingerprint().get(spec.name) == self.manifest.base.sha256.get(spec.name):
                    return own.text_encoder(spec, config, what)
        raise InputError(
            f"a LoRA changes the {spec.title}, {self.fine_tune.name} has none, and that of {what} is not to be found "
            f"at {' or '.join(dict.fromkeys(names))}; give the fine-tune as a diffusers folder"
        )

    def _swap(
        self, name: str, entry: NetworkRecord, weights: dict[str, Any], golden: Golden, loaded: list[Any], work: Path,
        stages: int,
    ) -> tuple[NetworkRecord, Golden, str | None]:  # fmt: skip
        """New weights for one network, compared with PyTorch: its record, its golden inputs with the new outputs by
        size, and where the guide came from.
        """
        import torch

        from ...precision.recipes import as_arrays, reference
        from ..parity import realistic_case, relative_error
        from .lora import written as written_weights
        from .rewrite import check_keys, rewrite

        self._report(f"swap {self.title(name)}", stages)
        source, whole = (name, self.specs[name].whole) if name in self.specs else SOURCES[name]
        graph, data = work / entry.graph, entry.data
        inputs = {case: {k: torch.from_numpy(v) for k, v in held[0].items()} for case, held in golden.items()}
        with _described_wrongly(f"engine '{self.manifest.name}'", name):
            module, swapped, guide, formula = self._module(name, weights, loaded, work)
            new = {source: dict(swapped.state_dict())}
            check_keys(weights, new, whole)
            written_sha256 = rewrite(graph, self.old[data], work / data, weights, new)
            written_weights.check(graph, weights, source, formula)
            wanted = {case: as_arrays(reference(module, given)) for case, given in inputs.items()}
            hard = []
            if name == "vae_decoder" and find_recipe(entry.precision).dtype != FP32.dtype:
                factor = self.manifest.image.height // self.manifest.sample.height
                hard = [realistic_case(module, next(iter(inputs.values())), factor)]
        self.files[data] = FileRecord(written_sha256, (work / data).stat().st_size)
        del module, swapped, new
        gc.collect()
        self._report(f"compare {self.title(name)}", stages)
        errors = {case: relative_error(graph, inputs[case], wanted[case]) for case in inputs}
        found = [*errors.values(), *(relative_error(graph, *case) for case in hard)]
        error, limit = float(np.max(found)), entry.parity.limit  # NaN if any is
        if not error <= limit:  # also refuses NaN
            raise PnpError(
                f"the {name} with the weights of {self.fine_tune.source_of(source)} differs from PyTorch by "
                f"{error:.2e} (relative), where {limit:.0e} is allowed in {entry.precision}; nothing was written; "
                "build it with another --precision, or report it"
            )
        sizes = dict(zip(entry.parity.sizes, errors.values(), strict=True)) if len(errors) > 1 else {}
        entry = replace(entry, parity=replace(entry.parity, graph=error, sizes=sizes))
        return entry, {case: (held[0], wanted[case]) for case, held in golden.items()}, guide

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
        made = self.backend.replace_weights(job, work / _OLD / entry.file, lambda *_: None)
        return replace(entry, compiled=CompileRecord(round(made.seconds, 1), made.peak_memory, made.notes))

    def _hashes(self, loaded: list[Any]) -> dict[str, str]:
        """What the new bundle's base is made of, by network."""
        own = self.manifest.base.sha256
        out = {k: v for k, v in own.items() if k != "all"} | self.fine_tune.fingerprint()
        for network in ("unet", *self.specs):
            if changed := [one.lora.identity() for one in loaded if network in one.changes]:
                changes = [{k: v for k, v in c.items() if k != "name"} for c in changed]
                out[network] = digest([out[network], changes])
        out["all"] = digest(out)
        return out

    def _files(self, work: Path) -> dict[str, FileRecord]:
        """Hash of every file, those that are known already not taken again."""
        out = dict(self.files)
        present = {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()}
        for name, path in present.items():
            if name not in out:
                out[name] = FileRecord(sha256(path), path.stat().st_size)
        return {name: out[name] for name in sorted(present)}


@contextmanager
def _described_wrongly(what: str, network: str) -> Iterator[None]:
    """Configs and maps of weights come with the engine; the libraries raise many types where they do not fit."""
    try:
        yield
    except (PnpError, OSError):
        raise
    except Exception as e:
        why = printable(f"{type(e).__name__}: {e}", limit=200)
        raise InputError(
            f"{what}: configs or {WEIGHTS} do not describe the {network} ({why}); build it of the fine-tune instead"
        ) from e

"""Run one build: export, compile and compare every network, and write the manifest last."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..backends.base import MAX_BATCH, Backend, CompileJob, Profile, Progress, Size
from ..bundle import memory
from ..bundle.golden_file import Golden, save_golden
from ..bundle.manifest import (
    GOLDEN,
    MAX_CHUNKS,
    WEIGHTS,
    Base,
    BuildArguments,
    CompileRecord,
    FurtherText,
    GuideRecord,
    ImageSize,
    LatentShape,
    Manifest,
    NetworkRecord,
    Tokens,
    tokenizer_file,
)
from ..bundle.parts import Parts, RunResult, assemble
from ..bundle.profiles import by_chunks, once_and_twice
from ..bundle.store import list_files, whole_folder, write_json, write_manifest
from ..errors import InputError
from ..io.replacing import check_removable_bundle
from ..models.identity import guide_name
from ..models.specs import TITLES, NetworkSpec
from ..precision.int8.record import Record
from ..precision.recipes import Recipe
from ..version import __version__, installed
from .network import NetworkExport
from .sizes import SizePlan
from .spec import BuildSpec

#: distributions whose versions a manifest records, for information only
_REMEMBERED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime")


@dataclass
class Build:
    """State of one build."""

    spec: BuildSpec
    base: Any
    scheduler: dict[str, Any]
    backend: Backend
    recipe: Recipe
    target: str
    plan: SizePlan
    progress: Progress
    record: Record | None = None

    def run(self, folder: Path, key: str, identity: dict[str, Any]) -> Manifest:
        import torch

        from ..graph.weights import SCHEMA as WEIGHTS_SCHEMA
        from ..models.tokenizer import copy_tokenizer

        started = time.monotonic()
        modules = self._networks
        stages = len(modules) * 2 + 2
        with whole_folder(folder, check_removable_bundle) as work:
            self._stage("load", 0, stages)
            self._check_inputs()
            tokens = {
                spec.name: Tokens(**copy_tokenizer(self.base, spec, work / tokenizer_file(spec.name)))
                for spec in self.base.text_specs
            }
            first = next(iter(tokens))
            length = tokens[first].length
            self.plan = self.plan.for_chunks(length, self._chunks(length))
            export = NetworkExport(self.backend, self.recipe, self.plan, self.record, self.target)
            # with a sharpener, the U-Net does not read negative prompts
            negative = bool((identity["guide"] or {}).get("negative_prompts")) and not self._sharpened
            golden = self._golden_inputs(length, negative)
            networks: dict[str, NetworkRecord] = {}
            compared: Golden = {}
            maps: dict[str, Any] = {}
            for i, (name, spec) in enumerate(modules.items()):
                self._stage(f"export {spec.title}", 1 + i, stages)
                cases = {label: inputs[name] for label, inputs in golden.items() if name in inputs}
                networks[name], references, maps[name] = export.write(name, spec, cases, work)
                compared |= references
                if name == "condition":
                    for inputs in golden.values():
                        inputs["unet"]["condition"] = torch.from_numpy(compared[name][1])
            exported = memory.peak()
            gc.collect()
            for i, name in enumerate(modules):
                networks[name] = self._compile(name, networks[name], work, (1 + len(modules) + i, stages))
            self._stage("compare and write", stages - 1, stages)
            save_golden(work / GOLDEN, compared)
            write_json(work / WEIGHTS, {"schema": WEIGHTS_SCHEMA, "networks": maps})
            engines = engine_parity(self.backend, self.target, work, networks, compared, self.spec.folder().name)
            result = RunResult(
                name=folder.name, key=key, built_from=identity, networks=networks, engine_parity=engines,
                files=list_files(work), versions=library_versions(), seconds=time.monotonic() - started,
                export_memory=exported, rebuild=self.spec.command(),
            )  # fmt: skip
            return write_manifest(work, assemble(self._parts(identity, tokens), result))

    def _golden_inputs(self, length: int, negative: bool) -> dict[str, dict[str, dict[str, Any]]]:
        """Golden inputs by case and network: default size, second size and longest prompts, the latter two if any."""
        from .parity import sharpener_inputs

        def of(size: Size, tokens: int) -> dict[str, dict[str, Any]]:
            inputs = self.base.golden_inputs(
                self.plan.latent(size), size, tokens, guided=self._guided, negative=negative,
                image_to_image=self.spec.image_to_image,
            )  # fmt: skip
            if self._sharpened:
                inputs["sharpener"] = sharpener_inputs(inputs["unet"])
            return inputs

        sizes = [size for size in (self.plan.default, self.plan.second) if size is not None]
        golden = {f"{size[0]}x{size[1]}": of(size, length) for size in sizes}
        if (most := self.spec.tokens or length) > length:
            golden[f"{most} tokens"] = {"unet": of(self.plan.default, most)["unet"]}
        return golden

    def _parts(self, identity: dict[str, Any], tokens: dict[str, Tokens]) -> Parts:
        """Manifest entries that do not depend on the run."""
        first = next(iter(tokens))
        length = tokens[first].length
        most = self.spec.tokens or length
        return Parts(
            base=Base(self.spec.base, self.base.fingerprint()),
            guide=GuideRecord.of(identity["guide"]),
            # `pnp-trt plug` needs the configs, to check a fine-tune, and the origin of the guide
            given=BuildArguments(self.spec.base, self.spec.guide),
            configs=self._configs(),
            backend=self.backend.name,
            precision=self.recipe.name,
            target=self.target,
            profiles=self.plan.profiles,
            compiler=identity["compiler"],
            sample=LatentShape(
                *self.plan.latent(self.plan.default),
                max_batch=max((p.maximum for p in self.plan.profiles), default=MAX_BATCH),
            ),
            image=ImageSize(*self.plan.default),
            tokens=tokens[first],
            scheduler=self.scheduler,
            limit=self.recipe.limit,
            against="PyTorch float32, seeded golden inputs",
            family=self.base.family,
            text=FurtherText(
                {k: v for k, v in tokens.items() if k != first}, self.base.zero_empty_prompt(), most // length
            ),
        )

    @property
    def _guided(self) -> bool:
        return self.spec.guide != "none"

    def _chunks(self, length: int) -> int:
        """Largest number of chunks of ``length`` tokens in a prompt.

        Raises:
            InputError: if ``--tokens`` is not a whole number of chunks, or too large.
        """
        tokens = length if self.spec.tokens is None else self.spec.tokens
        if tokens % length or not 1 <= tokens // length <= MAX_CHUNKS:
            raise InputError(
                f"--tokens is {tokens}; prompts of this model have chunks of {length} tokens; give a multiple of that, "
                f"from {length} to {MAX_CHUNKS * length}"
            )
        return tokens // length

    def _stage(self, name: str, done: int, stages: int, share: float = 0.0) -> None:
        self.progress(name, int(100 * (done + share)), 100 * stages)

    def _check_inputs(self) -> None:
        """Load the networks that are exported after the U-Net, to report damaged files before minutes of work."""
        if self.spec.base.startswith("random:"):
            return
        for text in self.base.text_specs:
            self.base.text_encoder(text)
            gc.collect()
        self.base.vae()
        gc.collect()

    @cached_property
    def _networks(self) -> dict[str, NetworkSpec]:
        """The bundle's networks in export order."""
        from ..models.guides.condition import Condition
        from ..models.guides.sharpener import Sharpen

        size = self.plan.latent(self.plan.default)[1:]
        networks: dict[str, NetworkSpec] = self.base.networks(self.spec.image_to_image)
        networks["unet"] = replace(networks["unet"], module=self._student)
        if self._sharpened:
            networks["sharpener"] = NetworkSpec(
                TITLES["sharpener"], lambda: Sharpen(self._guide()), ("sharpened",), sized=False, one_by_one=True
            )
        if not self._conditioned:
            return networks
        condition = NetworkSpec(TITLES["condition"], lambda: Condition(self._guide(), size), ("condition",))
        return {"condition": condition, **networks}  # first, since its output is an input of the U-Net

    def _student(self) -> Any:
        from ..models.guides.sharpener import without_sharpener
        from ..models.student import Student

        if not self._guided:
            return self.base.denoiser()
        unet = self.base.unet()
        guide = without_sharpener(self._guide(unet))
        guide.side_by_side = self.backend.side_by_side
        return Student(unet, guide, self._conditioned)

    def _guide(self, unet: Any = None) -> Any:
        """The guide; ``unet`` avoids loading the U-Net again for a base that creates its guides."""
        from ..models.guides.load import load_guide

        if self.base.guide_class(self.spec.guide) is None:
            return load_guide(guide_name(self.spec.guide))
        return self.base.make_guide(self.spec.guide, self.base.unet() if unet is None else unet)

    @property
    def _conditioned(self) -> bool:
        """Whether the part of the guide that depends only on w is a separate network, which runs once per image.

        That network is exported for one latent size, so a graph with several sizes keeps the part inside.
        """
        from ..models.guides.load import guide_class

        if not self._guided or self.plan.open_axes:
            return False
        kind = self.base.guide_class(self.spec.guide) or guide_class(guide_name(self.spec.guide))
        return bool(kind.constant_parts)

    @cached_property
    def _sharpened(self) -> bool:
        """Whether the guide has a sharpener, a separate network that reads the negative prompt."""
        from ..models.catalog import guide_config, guide_folder

        if not self._guided or self.base.random_guide(self.spec.guide) is not None:
            return False
        return bool(guide_config(guide_folder(guide_name(self.spec.guide))).get("sharpener_width"))

    def _compile(self, name: str, record: NetworkRecord, work: Path, at: tuple[int, int]) -> NetworkRecord:
        def report(phase: str, done: int, total: int, note: str = "", /) -> None:
            self._stage(f"compile {self._networks[name].title}", *at, share=min(1.0, done / max(total, 1)))

        job = CompileJob(
            network=name,
            graph=work / record.graph,
            inputs=record.inputs,
            precision=record.precision,
            target=self.target,
            profiles=self._profiles(name),
            options=self.spec.options,
            tensor_float32=record.float32_for_range,
        )
        result = self.backend.compile(job, report)
        compiled = CompileRecord(round(result.seconds, 1), result.peak_memory, result.notes)
        return replace(record, file=result.file, profiles=job.profiles, compiled=compiled)

    def _profiles(self, network: str) -> tuple[Profile, ...]:
        if not self.plan.profiles:
            return ()
        if self._networks[network].one_by_one:  # no row may depend on another
            alone = Profile("b1", 1, 1, 1)
            if network != "vae_encoder" or not self.plan.open_axes:
                return (alone,)
            sizes = dict.fromkeys((p.height, p.width, p.step) for p in self.plan.profiles)
            return tuple(replace(alone, height=h, width=w, step=step) for h, w, step in sizes)  # in pixels
        profiles = tuple(p.in_latents(self.plan.factor) for p in self.plan.profiles)
        if network == "unet" and not self._guided:
            profiles = once_and_twice(profiles)  # classifier-free guidance is a batch of two
        if network == "unet" and (tokens := self.plan.tokens) is not None and self.backend.profiles:
            profiles = by_chunks(profiles, tokens.step, tokens.high)
        return profiles

    def _configs(self) -> dict[str, dict[str, Any]]:
        first, *others = (spec.name for spec in self.base.text_specs)
        configs = {n: self.base.config(n) for n in ("unet", first, "vae", *others)}
        if self._guided and self.base.random_guide(self.spec.guide) is None:
            from ..models.catalog import guide_folder
            from ..models.files import read_json

            configs["guide"] = read_json(guide_folder(guide_name(self.spec.guide)) / "config.json")
        return configs


def engine_parity(
    backend: Backend,
    target: str,
    folder: Path,
    networks: Mapping[str, NetworkRecord],
    golden: Golden,
    name: str,
) -> dict[str, float] | str:
    """Errors of compiled engines on their golden inputs, or the reason why they were not measured.

    Args:
        networks: the manifest's networks; those in ``golden`` are compared.
        name: name of the bundle, for the message.

    Raises:
        PnpError: for the first engine whose error exceeds its recipe's limit.
    """
    from ..runtime.verify import compare, gate

    if all(n.file == n.graph for n in networks.values()):
        return "not compiled: the backend runs the graphs"
    if reason := backend.cannot_run(target):
        return f"not measured: {reason}; run pnp-trt verify on the machine that serves it"
    errors = compare(backend, folder, networks, golden)
    gate(errors, networks, name)
    return errors


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a build used, recorded in the manifest for information only."""
    return {"pnp-trt": __version__, **installed(_REMEMBERED)}

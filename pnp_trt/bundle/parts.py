"""Assemble the manifest of a new bundle, for `pnp-trt build` and `pnp-trt plug`."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .manifest import (
    Base,
    BuildArguments,
    FileRecord,
    FurtherText,
    GuideRecord,
    ImageSize,
    LatentShape,
    Manifest,
    NetworkRecord,
    Parity,
    PeakMemory,
    PlugRecord,
    Tokens,
)
from .profiles import Profile


@dataclass(frozen=True)
class Parts:
    """Properties of a bundle that do not depend on the run that built it; see ``Manifest``.

    Attributes:
        limit: largest relative error that the recipe allows.
        against: description of the reference for the errors.
    """

    base: Base
    guide: GuideRecord | None
    given: BuildArguments | None
    configs: Mapping[str, Mapping[str, Any]] | None
    backend: str
    precision: str
    target: str
    profiles: tuple[Profile, ...]
    compiler: Mapping[str, str]
    sample: LatentShape
    image: ImageSize
    tokens: Tokens
    scheduler: Mapping[str, Any]
    limit: float
    against: str
    family: str
    text: FurtherText

    @classmethod
    def of(cls, manifest: Manifest) -> Parts:
        """The parts of an existing bundle."""
        own = {f.name: getattr(manifest, f.name) for f in fields(cls) if f.name not in ("limit", "against")}
        return cls(**own, limit=manifest.parity.limit, against=manifest.parity.against)


@dataclass(frozen=True)
class RunResult:
    """Results of one run of `build` or `plug`.

    Attributes:
        seconds: wall time of the run.
        export_memory: peak resident memory in bytes before compiling.
        compiled: names of the networks that this run compiled; None for all.
    """

    name: str
    key: str
    built_from: Mapping[str, Any]
    networks: Mapping[str, NetworkRecord]
    engine_parity: Mapping[str, float] | str
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    seconds: float
    export_memory: int | None
    rebuild: str
    plugged: PlugRecord | None = None
    compiled: Iterable[str] | None = None


def assemble(parts: Parts, result: RunResult) -> Manifest:
    """Assemble an unsealed manifest with the current time as its build time."""
    errors = {name: n.parity.graph for name, n in result.networks.items()}
    compiled = result.networks if result.compiled is None else result.compiled
    memory = [peak for name in compiled if (peak := result.networks[name].compiled.peak_memory)]
    own = {f.name: getattr(parts, f.name) for f in fields(parts) if f.name not in ("limit", "against")}
    return Manifest(
        **own,
        name=result.name,
        key=result.key,
        built_from=result.built_from,
        networks=result.networks,
        parity=Parity(errors, parts.limit, parts.against, result.engine_parity),
        files=result.files,
        versions=result.versions,
        built=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        build_seconds=round(result.seconds, 1),
        peak_memory=PeakMemory(result.export_memory, max(memory, default=None)),
        rebuild=result.rebuild,
        plugged=result.plugged,
    )

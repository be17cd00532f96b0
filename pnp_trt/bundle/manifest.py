"""The manifest of a bundle as typed, validated values; reading and writing preserves the JSON.

A manifest is untrusted, and its seal only shows that it is complete.  Every name that becomes a path is relative and
stays in the bundle, every file that is loaded is listed in ``files`` with its hash, and every number is within bounds
that this program supports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BundleCorrupt
from .compile_options import CompileOptions
from .document import Value, check_bounds, check_sizes
from .profiles import MAX_BATCH, MAX_SIDE, Extent, Profile
from .scheduler_config import scheduler_entries

SCHEMA = 2
FILE = "manifest.json"
#: files of a bundle beside its networks; ``weights.json`` is read by `pnp-trt plug`, ``golden.npz`` also by `verify`
GOLDEN, WEIGHTS = "golden.npz", "weights.json"
#: the first text encoder; names of the others start with this
TEXT_ENCODER = "text_encoder"
NETWORKS = ("unet", "text_encoder", "vae_decoder")
OPTIONAL_NETWORKS = ("condition", "sharpener", "vae_encoder", "text_encoder_2")
#: family of bundles without an entry for it
FAMILY = "sd"
#: SDXL's U-Net input for image sizes (``runtime.text.time_ids``)
TIME_IDS = "time_ids"
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")
#: names of dynamic dimensions
OPEN = (
    "batch", "height", "width", "image_height", "image_width", "latent_height", "latent_width", "tokens",
)  # fmt: skip
#: dynamic dimension of text states if prompts may have several chunks
TOKENS = "tokens"
#: upper bounds of tokens of a prompt, channels of a latent, and sampling steps
MAX_TOKENS, MAX_CHANNELS, MAX_STEPS = 4096, 256, 1000
#: largest number of chunks of a prompt
MAX_CHUNKS = 8
_REQUIRED = (
    "schema", "name", "key", "built_from", "base", "guide", "backend", "precision", "target", "profiles", "compiler",
    "networks", "sample", "image", "tokens", "scheduler", "parity", "files", "versions", "built", "build_seconds",
    "peak_memory", "rebuild",
)  # fmt: skip
_OPTIONAL = ("given", "configs", "plugged", "seal", "family", "text")
_MOST_BYTES = 1 << 40
_HASH, _WORD = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ADVICE = "build the bundle again"

#: element type and shape; a dimension is a number, or a name if it is dynamic
Tensor = tuple[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class _Record:
    """A part of the manifest whose JSON keys are its field names."""

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class FileRecord:
    """Hash and size in bytes of one file."""

    sha256: str
    size: int

    @classmethod
    def read(cls, value: Value) -> FileRecord:
        """Read a member of ``files``."""
        m = value.members(("sha256", "bytes"))
        return cls(_hash(m["sha256"]), m["bytes"].integer(0, _MOST_BYTES))

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        return {"sha256": self.sha256, "bytes": self.size}


@dataclass(frozen=True)
class LoraRecord(_Record):
    """A LoRA merged into the base: its name, the hash of its file, and the scale."""

    name: str
    sha256: str
    scale: float

    @classmethod
    def read(cls, value: Value) -> LoraRecord:
        """Read a member of ``base.loras``."""
        m = value.members(("name", "sha256", "scale"))
        return cls(m["name"].text(), _hash(m["sha256"]), m["scale"].number(-1e6, 1e6))


@dataclass(frozen=True)
class Base:
    """The base model: its name, and the hashes of each network's weights and of all weights (``all``)."""

    name: str
    sha256: Mapping[str, str]
    loras: tuple[LoraRecord, ...] = ()

    @classmethod
    def read(cls, value: Value) -> Base:
        """Read ``base``."""
        m = value.members(("name", "sha256"), ("loras",))
        hashes = {k: _hash(v) for k, v in m["sha256"].entries(20).items()}
        if "all" not in hashes:
            raise m["sha256"].member("all").refuse("must be a hash")
        loras = tuple(LoraRecord.read(v) for v in m["loras"].items(1, 100)) if "loras" in m else ()
        return cls(m["name"].text(), hashes, loras)

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        out: dict[str, Any] = {"name": self.name, "sha256": dict(self.sha256)}
        return out | ({"loras": [lora.to_json() for lora in self.loras]} if self.loras else {})


@dataclass(frozen=True)
class GuideRecord:
    """The guide fused into the U-Net.

    Attributes:
        name: a file name, not a path.
        negative_prompts: whether it was distilled with negative prompts; None if not recorded.
        sampling_steps: the number of steps if it was distilled for only one, else None.
    """

    name: str
    sha256: str
    negative_prompts: bool | None = None
    sampling_steps: int | None = None

    @classmethod
    def read(cls, value: Value) -> GuideRecord:
        """Read ``guide``."""
        m = value.members(("name", "sha256"), ("negative_prompts", "sampling_steps"))
        if ("negative_prompts" in m) != ("sampling_steps" in m):
            raise value.refuse("must have both negative_prompts and sampling_steps, or neither")
        name = _plain_name(m["name"])
        if "sampling_steps" not in m:
            return cls(name, _hash(m["sha256"]))
        steps = m["sampling_steps"].nullable(lambda v: v.integer(1, MAX_STEPS))
        return cls(name, _hash(m["sha256"]), m["negative_prompts"].flag(), steps)

    @classmethod
    def of(cls, identity: Mapping[str, Any] | None) -> GuideRecord | None:
        """Convert the result of ``models.identity.guide_identity``."""
        return None if identity is None else cls(**identity)

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        out: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        if self.negative_prompts is not None:
            out |= {"negative_prompts": self.negative_prompts, "sampling_steps": self.sampling_steps}
        return out


@dataclass(frozen=True)
class BuildArguments(_Record):
    """The base and guide arguments of `pnp-trt build`."""

    base: str
    guide: str

    @classmethod
    def read(cls, value: Value) -> BuildArguments:
        """Read ``given``."""
        m = value.members(("base", "guide"))
        return cls(m["base"].text(), m["guide"].text())


@dataclass(frozen=True)
class NetworkParity:
    """Relative errors of a graph against PyTorch, and their limit.

    Attributes:
        sizes: errors by image size if there are several.
    """

    graph: float
    limit: float
    rows: int
    sizes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, value: Value) -> NetworkParity:
        """Read ``networks.*.parity``."""
        m = value.members(("graph", "limit", "rows"), ("sizes",))
        sizes = {k: _error(v) for k, v in m["sizes"].entries(100).items()} if "sizes" in m else {}
        if "sizes" in m and not sizes:
            raise m["sizes"].refuse("must have members, or be omitted")
        return cls(_error(m["graph"]), _error(m["limit"]), m["rows"].integer(1, 1024), sizes)

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        out: dict[str, Any] = {"graph": self.graph, "limit": self.limit, "rows": self.rows}
        return out | ({"sizes": dict(self.sizes)} if self.sizes else {})


@dataclass(frozen=True)
class CompileRecord:
    """How a network was compiled: seconds, peak memory in bytes, and the backend's notes."""

    seconds: float = 0.0
    peak_memory: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, value: Value) -> CompileRecord:
        """Read ``networks.*.compiled``."""
        m = value.entries(50)
        seconds, peak = value.member("seconds").number(0, 1e7), value.member("peak_memory")
        notes = {k: v.raw for k, v in m.items() if k not in ("seconds", "peak_memory")}
        if "mode" in m:
            m["mode"].text(known=("eager", "compile"))
        if "host_code" in m:
            m["host_code"].flag()
        if "weights" in m:
            m["weights"].text(longest=1000)
        return cls(seconds, peak.nullable(_bytes), notes)

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        return {"seconds": self.seconds, "peak_memory": self.peak_memory, **self.notes}


#: 8-bit types of a quantised network; the key of its entry in the manifest
QUANTISED_TYPES = ("int8", "fp8")


@dataclass(frozen=True)
class QuantisedRecord:
    """Quantisation of a network: number of layers, whether their inputs are quantised, and how that was decided.

    Attributes:
        type: ``int8`` or ``fp8``, the key of this record in ``networks.*``.
    """

    type: str
    layers: int
    activations: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, kind: str, value: Value) -> QuantisedRecord:
        """Read ``networks.*.int8`` or ``networks.*.fp8``."""
        m = value.entries(50)
        layers, activations = value.member("layers").integer(0, 100_000), value.member("activations").flag()
        if activations:
            value.member("share_of_macs").number(0, 1)
            value.member("decision").member("float").items(0, 50_000)
        return cls(kind, layers, activations, {k: v.raw for k, v in m.items() if k not in ("layers", "activations")})

    @property
    def share_of_macs(self) -> float:
        """Share of the arithmetic in 8 bits; only if inputs are quantised too."""
        return float(self.details["share_of_macs"])

    @property
    def floating_point(self) -> list[Any]:
        """Layers in floating point; only if inputs are quantised too."""
        return list(self.details["decision"]["float"])

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        return {"layers": self.layers, "activations": self.activations, **self.details}


@dataclass(frozen=True)
class NetworkRecord:
    """One network of a bundle.

    Attributes:
        graph: the exported ONNX file, or the description of the PyTorch module.
        inputs, outputs: tensors by name.
        fallback: reason why it is not in the recipe's precision; None if it is.
        quantised: record of its quantisation; None if it is not quantised.
        file: the file to load: the graph itself, or the engine compiled from it.
        profiles: batch sizes, and sizes in latent pixels.
    """

    graph: str
    precision: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    parity: NetworkParity
    fallback: str | None = None
    quantised: QuantisedRecord | None = None
    file: str = ""
    profiles: tuple[Profile, ...] = ()
    compiled: CompileRecord = CompileRecord()

    @classmethod
    def read(cls, value: Value) -> NetworkRecord:
        """Read a member of ``networks``."""
        required = ("graph", "precision", "inputs", "outputs", "parity", "file", "profiles", "compiled")
        m = value.members(required, ("fallback", *QUANTISED_TYPES))
        return cls(
            graph=file_name(m["graph"]),
            precision=m["precision"].text(longest=50, pattern=_WORD, form="a recipe's name"),
            inputs={k: _tensor(v) for k, v in m["inputs"].entries(20, longest_key=100).items()},
            outputs={k: _tensor(v) for k, v in m["outputs"].entries(20, longest_key=100).items()},
            parity=NetworkParity.read(m["parity"]),
            fallback=m["fallback"].text(longest=2000) if "fallback" in m else None,
            quantised=next((QuantisedRecord.read(k, m[k]) for k in QUANTISED_TYPES if k in m), None),
            file=file_name(m["file"]),
            profiles=tuple(_profile(v) for v in m["profiles"].items(0, 64)),
            compiled=CompileRecord.read(m["compiled"]),
        )

    @property
    def float32_for_range(self) -> bool:
        """Whether it is in float32 because its values exceed the range of half precision, not for accuracy."""
        return self.fallback is not None and self.precision == "fp32"

    @property
    def data(self) -> str:
        """The weight file of an ONNX graph."""
        return f"{self.graph}.data"

    def loaded(self) -> tuple[str, ...]:
        """Files that are read to load or swap this network, except the optional weight file."""
        names = {self.graph, self.file, re.sub(r"\.safetensors$", ".json", self.file)}
        return tuple(sorted(names))

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        return {
            "graph": self.graph,
            "precision": self.precision,
            "inputs": _tensors_json(self.inputs),
            "outputs": _tensors_json(self.outputs),
            "parity": self.parity.to_json(),
            **({} if self.fallback is None else {"fallback": self.fallback}),
            **({} if self.quantised is None else {self.quantised.type: self.quantised.to_json()}),
            "file": self.file,
            "profiles": [p.as_dict() for p in self.profiles],
            "compiled": self.compiled.to_json(),
        }


@dataclass(frozen=True)
class LatentShape(_Record):
    """The default latent's shape, and the largest batch size."""

    channels: int
    height: int
    width: int
    max_batch: int

    @classmethod
    def read(cls, value: Value) -> LatentShape:
        """Read ``sample``."""
        m = value.members(("channels", "height", "width", "max_batch"))
        height, width = m["height"].integer(1, MAX_SIDE), m["width"].integer(1, MAX_SIDE)
        return cls(m["channels"].integer(1, MAX_CHANNELS), height, width, m["max_batch"].integer(1, MAX_BATCH))


@dataclass(frozen=True)
class ImageSize(_Record):
    """The default image's height and width in pixels."""

    height: int
    width: int

    @classmethod
    def read(cls, value: Value) -> ImageSize:
        """Read ``image``."""
        m = value.members(("height", "width"))
        return cls(m["height"].integer(1, MAX_SIDE), m["width"].integer(1, MAX_SIDE))


@dataclass(frozen=True)
class Tokens(_Record):
    """Number of tokens that a prompt is padded or truncated to, and the id for padding."""

    length: int
    pad: int

    @classmethod
    def read(cls, value: Value) -> Tokens:
        """Read ``tokens``."""
        m = value.members(("length", "pad"))
        return cls(m["length"].integer(2, MAX_TOKENS), m["pad"].integer(0, 2**31 - 1))


@dataclass(frozen=True)
class FurtherText:
    """Text settings besides ``Manifest.tokens``, which describes the first text encoder.

    Attributes:
        tokens: tokens of the other text encoders, by network.
        zero_empty_prompt: whether CFG without a negative prompt uses zeros instead of the empty prompt's states.
        chunks: largest number of chunks of ``tokens.length`` tokens in a prompt; if it is not 1, the U-Net's ``tokens``
            dimension is dynamic.
    """

    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    zero_empty_prompt: bool = False
    chunks: int = 1

    @classmethod
    def read(cls, value: Value) -> FurtherText:
        """Read ``text``."""
        m = value.members(("tokens", "zero_empty_prompt"), ("chunks",))
        others = tuple(n for n in OPTIONAL_NETWORKS if n.startswith(TEXT_ENCODER))
        tokens = {k: Tokens.read(v) for k, v in m["tokens"].members((), others).items()}
        chunks = m["chunks"].integer(1, MAX_CHUNKS) if "chunks" in m else 1
        return cls(tokens, m["zero_empty_prompt"].flag(), chunks)

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        tokens = {k: t.to_json() for k, t in self.tokens.items()}
        more = {"chunks": self.chunks} if self.chunks != 1 else {}
        return {"tokens": tokens, "zero_empty_prompt": self.zero_empty_prompt, **more}


@dataclass(frozen=True)
class Parity(_Record):
    """Errors of graphs and of engines against PyTorch, by network, or the reason why engines were not measured."""

    relative_error: Mapping[str, float]
    limit: float
    against: str
    engine: Mapping[str, float] | str

    @classmethod
    def read(cls, value: Value) -> Parity:
        """Read ``parity``."""
        m = value.members(("relative_error", "limit", "against", "engine"))
        errors = {k: _error(v) for k, v in m["relative_error"].entries(50).items()}
        return cls(errors, _error(m["limit"]), m["against"].text(longest=1000), _engine_parity(m["engine"]))


@dataclass(frozen=True)
class PeakMemory(_Record):
    """Peak resident memory in bytes during export and compilation; None if not measured."""

    export: int | None
    compile: int | None

    @classmethod
    def read(cls, value: Value) -> PeakMemory:
        """Read ``peak_memory``."""
        m = value.members(("export", "compile"))
        return cls(m["export"].nullable(_bytes), m["compile"].nullable(_bytes))


@dataclass(frozen=True)
class PlugRecord:
    """Origin of a plugged bundle.

    Attributes:
        source: name, key and base of the engine that was plugged.
        networks: how each network's weights were replaced.
        guide_read_from: origin of the guide's weights; None without a guide.
        commands: command lines that create the bundle from scratch, as claimed by the manifest.
    """

    source: Mapping[str, str]
    networks: Mapping[str, str]
    guide_read_from: str | None
    commands: tuple[str, ...]

    @classmethod
    def read(cls, value: Value) -> PlugRecord:
        """Read ``plugged``."""
        m = value.members(("from", "networks", "guide_read_from", "commands"))
        source = {k: v.text() for k, v in m["from"].members(("name", "key", "base")).items()}
        networks = {k: v.text(longest=1000) for k, v in m["networks"].entries(20).items()}
        commands = tuple(v.text(longest=16_000) for v in m["commands"].items(1, 100))
        return cls(source, networks, m["guide_read_from"].nullable(Value.text), commands)

    def to_json(self) -> dict[str, Any]:
        """The JSON for the manifest."""
        return {
            "from": dict(self.source), "networks": dict(self.networks), "guide_read_from": self.guide_read_from,
            "commands": list(self.commands),
        }  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest.

    Attributes:
        name: name of the folder when it was built.
        key: digest of all inputs of the build; equal keys mean equal bundles.
        built_from: inputs of the build, whose digest is the key.
        given, configs: arguments and configs of the build for `pnp-trt plug`; None in older bundles.
        target: GPU that it was compiled for, or ``any``.
        profiles: batch sizes, and image sizes in pixels.
        compiler: versions that the engines depend on, by distribution.
        scheduler: a diffusers scheduler's config.
        files: all files of the bundle except the manifest, by name.
        built: date and time, ISO 8601.
        rebuild: the command line that builds it, as claimed by the manifest.
        family: the base model's family, a key of ``FAMILIES``.
        text: further text settings.
        seal: digest of all other entries; empty until the manifest is written.
    """

    name: str
    key: str
    built_from: Mapping[str, Any]
    base: Base
    guide: GuideRecord | None
    given: BuildArguments | None
    configs: Mapping[str, Mapping[str, Any]] | None
    backend: str
    precision: str
    target: str
    profiles: tuple[Profile, ...]
    compiler: Mapping[str, str]
    networks: Mapping[str, NetworkRecord]
    sample: LatentShape
    image: ImageSize
    tokens: Tokens
    scheduler: Mapping[str, Any]
    parity: Parity
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    built: str
    build_seconds: float
    peak_memory: PeakMemory
    rebuild: str
    plugged: PlugRecord | None = None
    family: str = FAMILY
    text: FurtherText = FurtherText()
    seal: str = ""

    @classmethod
    def from_json(cls, document: Any, *, file: str = FILE, advice: str = _ADVICE) -> Manifest:
        """Convert a manifest's JSON and check every value.

        Args:
            file: the file of the document, for the message.
            advice: what to do about a wrong value, for the message.

        Raises:
            InputError: for the first value that is out of bounds, naming file, key, value and advice.
        """
        try:
            check_bounds(document)
        except ValueError as e:
            raise BundleCorrupt(f"{file} is out of bounds ({e}); {advice}") from None
        m = Value(document, "", file, advice).members(_REQUIRED, _OPTIONAL)
        if isinstance(m["schema"].raw, bool) or m["schema"].raw != SCHEMA:
            raise m["schema"].refuse(f"must be {SCHEMA}")
        manifest = cls(
            name=_plain_name(m["name"]),
            key=_hash(m["key"]),
            built_from=_built_from(m["built_from"]),
            base=Base.read(m["base"]),
            guide=m["guide"].nullable(GuideRecord.read),
            given=BuildArguments.read(m["given"]) if "given" in m else None,
            configs=_configs(m["configs"]) if "configs" in m else None,
            backend=m["backend"].text(longest=50, pattern=_WORD, form="a backend's name"),
            precision=m["precision"].text(longest=50, pattern=_WORD, form="a recipe's name"),
            target=m["target"].text(longest=100, shortest=1),
            profiles=tuple(_profile(v) for v in m["profiles"].items(0, 64)),
            compiler={k: v.text() for k, v in m["compiler"].entries(50).items()},
            networks={k: NetworkRecord.read(v) for k, v in m["networks"].members(NETWORKS, OPTIONAL_NETWORKS).items()},
            sample=LatentShape.read(m["sample"]),
            image=ImageSize.read(m["image"]),
            tokens=Tokens.read(m["tokens"]),
            scheduler=scheduler_entries(m["scheduler"]),
            parity=Parity.read(m["parity"]),
            files=_files(m["files"]),
            versions={k: v.text() for k, v in m["versions"].entries(100).items()},
            built=m["built"].text(longest=100),
            build_seconds=m["build_seconds"].number(0, 1e7),
            peak_memory=PeakMemory.read(m["peak_memory"]),
            rebuild=m["rebuild"].text(longest=16_000),
            plugged=PlugRecord.read(m["plugged"]) if "plugged" in m else None,
            family=m["family"].text(longest=50, pattern=_WORD, form="a family's name") if "family" in m else FAMILY,
            text=FurtherText.read(m["text"]) if "text" in m else FurtherText(),
            seal=_hash(m["seal"]) if "seal" in m else "",
        )
        _check_covered(manifest, m)
        _check_shapes(manifest, m)
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The JSON document, with the seal last, if there is one."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "key": self.key,
            "built_from": dict(self.built_from),
            "base": self.base.to_json(),
            "guide": None if self.guide is None else self.guide.to_json(),
            **({} if self.given is None else {"given": self.given.to_json()}),
            **({} if self.configs is None else {"configs": {k: dict(v) for k, v in self.configs.items()}}),
            "backend": self.backend,
            "precision": self.precision,
            "target": self.target,
            "profiles": [p.as_dict() for p in self.profiles],
            "compiler": dict(self.compiler),
            "networks": {k: n.to_json() for k, n in self.networks.items()},
            "sample": self.sample.to_json(),
            "image": self.image.to_json(),
            "tokens": self.tokens.to_json(),
            "scheduler": dict(self.scheduler),
            "parity": self.parity.to_json(),
            "files": {k: f.to_json() for k, f in self.files.items()},
            "versions": dict(self.versions),
            "built": self.built,
            "build_seconds": self.build_seconds,
            "peak_memory": self.peak_memory.to_json(),
            "rebuild": self.rebuild,
            **({} if self.plugged is None else {"plugged": self.plugged.to_json()}),
            **({} if self.family == FAMILY else {"family": self.family}),
            **({} if self.text == FurtherText() else {"text": self.text.to_json()}),
            **({"seal": self.seal} if self.seal else {}),
        }

    @property
    def options(self) -> CompileOptions:
        """Options with which its engines were compiled."""
        return CompileOptions(**self.built_from["options"])

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders, in the order in which their states are concatenated."""
        return tuple(sorted(name for name in self.networks if name.startswith(TEXT_ENCODER)))

    def tokens_of(self, encoder: str) -> Tokens:
        """Length and padding of a text encoder's prompts."""
        return self.tokens if encoder == TEXT_ENCODER else self.text.tokens[encoder]

    def vocabulary_of(self, encoder: str) -> int:
        """Number of rows of a text encoder's embedding table from its config; CLIP's if not recorded."""
        size = (self.configs or {}).get(encoder, {}).get("vocab_size", 49408)
        return size if isinstance(size, int) and size > 0 else 49408

    def size_of(self, file: str) -> int:
        """Size in bytes of a bundle's file, including a graph's external weights."""
        return sum(f.size for name, f in self.files.items() if name in (file, f"{file}.data"))


def tokenizer_file(encoder: str) -> str:
    """File name of a text encoder's tokenizer: ``tokenizer.json``, ``tokenizer_2.json``."""
    return f"tokenizer{encoder.removeprefix(TEXT_ENCODER)}.json"


def file_name(value: Value) -> str:
    """Check the name of a file inside the bundle: a relative path of ordinary names separated by ``/``."""
    name = value.text(longest=1024, shortest=1)
    ordinary = all(part and not part.startswith(".") and len(part) <= 255 for part in name.split("/"))
    if not ordinary or not name.isprintable() or "\\" in name or ":" in name or name == FILE:
        raise value.refuse("must be the name of a file inside the bundle, relative and without '..'")
    return name


def _plain_name(value: Value) -> str:
    name = value.text(longest=255, shortest=1)
    if "/" in name or name in (".", ".."):
        raise value.refuse("must be a name, not a path")
    return name


def _hash(value: Value) -> str:
    return value.text(longest=64, pattern=_HASH, form="a SHA-256 hash of 64 hexadecimal digits")


def _error(value: Value) -> Any:
    return value.number(0, 1e9)


def _engine_parity(value: Value) -> Mapping[str, float] | str:
    if isinstance(value.raw, str):
        return value.text()
    return {k: _error(v) for k, v in value.entries(50).items()}


def _bytes(value: Value) -> int:
    return value.integer(0, _MOST_BYTES)


def _extent(value: Value) -> Extent:
    low, best, high = (v.integer(1, MAX_SIDE) for v in value.items(3, 3))
    if not low <= best <= high:
        raise value.refuse("must be smallest, best and largest value, in ascending order")
    return low, best, high


def _profile(value: Value) -> Profile:
    m = value.members(("name", "minimum", "optimum", "maximum"), ("height", "width", "step", "tokens"))
    name = m["name"].text(longest=100, shortest=1)
    least, best, most = (m[k].integer(1, 2 * MAX_BATCH) for k in ("minimum", "optimum", "maximum"))
    if not least <= best <= most:
        raise value.refuse("must have minimum, optimum and maximum in ascending order")
    tokens = _extent(m["tokens"]) if "tokens" in m else None
    if "height" not in m and "width" not in m and "step" not in m:
        return Profile(name, least, best, most, tokens=tokens)
    height, width = (_extent(value.member(k)) for k in ("height", "width"))
    return Profile(name, least, best, most, height, width, value.member("step").integer(1, MAX_SIDE), tokens)


def _tensor(value: Value) -> Tensor:
    dtype, shape = value.items(2, 2)
    dimensions = tuple(
        v.text(known=OPEN) if isinstance(v.raw, str) else v.integer(1, 1_000_000) for v in shape.items(1, 8)
    )
    if dimensions[0] != "batch":
        raise shape.refuse("must begin with 'batch'")
    return dtype.text(known=DTYPES), dimensions


def _tensors_json(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [dtype, list(shape)] for name, (dtype, shape) in tensors.items()}


def _files(value: Value) -> dict[str, FileRecord]:
    out = {}
    for name, entry in value.entries(10_000).items():
        file_name(Value(name, f"files.{name}", value.file, value.advice))
        out[name] = FileRecord.read(entry)
    return out


def _built_from(value: Value) -> Mapping[str, Any]:
    value.entries(50)
    m = value.member("options").members(
        ("workspace", "refittable", "version_compatible", "hardware_compatible"), ("check_memory",)
    )
    m["workspace"].nullable(_bytes)
    for name in m.keys() - {"workspace"}:
        m[name].flag()
    return dict(value.raw)


def _configs(value: Value) -> dict[str, Mapping[str, Any]]:
    out: dict[str, Mapping[str, Any]] = {}
    for name, config in value.members(("unet", "text_encoder", "vae"), ("guide", "text_encoder_2")).items():
        for key, entry in config.entries(500).items():
            check_sizes(entry)
            if key == "_class_name":
                entry.text(longest=100, pattern=_IDENTIFIER, form="a class's name")
        out[name] = dict(config.raw)
    kind = value.member("vae").entries(500).get("_class_name")
    if kind is not None and not re.search("Autoencoder|VAE|VQ", str(kind.raw)):
        raise kind.refuse("must be the class of an autoencoder")
    return out


def _check_covered(manifest: Manifest, m: Mapping[str, Value]) -> None:
    """Check that every file that is loaded is in ``files`` and thus has a hash."""
    for name, network in manifest.networks.items():
        entry = m["networks"].member(name)
        for key, file in (("graph", network.graph), ("file", network.file)):
            if file not in manifest.files:
                raise entry.member(key).refuse("must be listed in files, so that a hash covers it")
        if missing := [f for f in network.loaded() if f not in manifest.files]:
            raise entry.member("file").refuse(f"needs {missing[0]}, which must be listed in files")
    for file in (*map(tokenizer_file, manifest.text_encoders), GOLDEN, WEIGHTS):
        if file not in manifest.files:
            raise m["files"].member(file).refuse("must be listed")


def _check_shapes(manifest: Manifest, m: Mapping[str, Value]) -> None:
    """Check that the networks' tensors are those that samplers use."""
    for name, network in manifest.networks.items():
        entry = m["networks"].member(name)
        several = name in manifest.text_encoders and len(network.outputs) > 1
        if len(network.outputs) != 1 and not several:
            raise entry.member("outputs").refuse("must name one output")
        expected = _expected_inputs(manifest, name)
        if unknown := sorted(network.inputs.keys() - expected.keys()):
            raise entry.member("inputs").member(unknown[0]).refuse("must not be present; samplers do not supply it")
        for tensor, (kind, shape) in expected.items():
            _check_tensor(entry.member("inputs").member(tensor), network.inputs.get(tensor), kind, shape)
        output = next(iter(network.outputs))
        kind, shape = _expected_output(manifest, name)
        _check_tensor(entry.member("outputs").member(output), network.outputs[output], kind, shape)
    _check_text(manifest, m)
    if manifest.image.height % manifest.sample.height or manifest.image.width % manifest.sample.width:
        raise m["image"].refuse(
            f"must be a multiple of the latent's size, {manifest.sample.height}x{manifest.sample.width}"
        )
    steps = manifest.scheduler.get("num_train_timesteps") or 1000
    if manifest.guide is not None and (manifest.guide.sampling_steps or 1) > steps:
        raise m["guide"].member("sampling_steps").refuse(f"must be at most num_train_timesteps, {steps}")


#: element kind (``float`` or ``int``) and shape without the batch; None matches any shape
_Expected = tuple[str, tuple[int | str, ...] | None]


def _expected_inputs(manifest: Manifest, network: str) -> dict[str, _Expected]:
    latent = (manifest.sample.channels, manifest.sample.height, manifest.sample.width)
    if network in manifest.text_encoders:
        return {"input_ids": ("int", (manifest.tokens.length,))}
    if network == "vae_decoder":
        return {"latents": ("float", latent)}
    if network == "vae_encoder":
        return {"pixels": ("float", (3, manifest.image.height, manifest.image.width))}
    if network == "condition":
        return {"guidance": ("float", ())}
    text = _text_shape(manifest)
    if network == "sharpener":
        states: _Expected = ("float", text)
        return {"encoder_hidden_states": states, "negative": states, "empty": states, "guidance": ("float", ())}
    out: dict[str, _Expected] = {
        "sample": ("float", latent), "timestep": ("int", ()), "encoder_hidden_states": ("float", text),
    }  # fmt: skip
    for encoder in manifest.text_encoders:  # outputs after the states are U-Net inputs of the same name
        out |= {k: ("float", shape[1:]) for k, (_, shape) in list(manifest.networks[encoder].outputs.items())[1:]}
    if TIME_IDS in manifest.networks["unet"].inputs:
        out[TIME_IDS] = ("float", (6,))
    if manifest.guide is not None:
        out["guidance"] = ("float", ())
        if manifest.guide.negative_prompts and "sharpener" not in manifest.networks:
            out["negative"] = ("float", text)
    if "condition" in manifest.networks:
        out["condition"] = ("float", _output_shape(manifest, "condition"))
    return out


def _expected_output(manifest: Manifest, network: str) -> _Expected:
    if network in ("unet", "vae_encoder"):
        return "float", (manifest.sample.channels, manifest.sample.height, manifest.sample.width)
    if network == "vae_decoder":
        return "float", (3, manifest.image.height, manifest.image.width)
    if network == "sharpener":
        return "float", _text_shape(manifest)
    return "float", None


def _check_text(manifest: Manifest, m: Mapping[str, Value]) -> None:
    """Check that text encoders have entries in ``text.tokens``, equal lengths and unique output names."""
    names: list[str] = []
    for name, (_, shape) in manifest.networks["unet"].inputs.items():
        if (TOKENS in shape) != (manifest.text.chunks > 1 and name in ("encoder_hidden_states", "negative")):
            raise (
                m["networks"]
                .member("unet")
                .member("inputs")
                .member(name)
                .refuse(f"must have a '{TOKENS}' dimension if it is text and text.chunks is above 1, and not otherwise")
            )
    for encoder in manifest.text_encoders:
        if encoder != TEXT_ENCODER and encoder not in manifest.text.tokens:
            raise m["networks"].member(encoder).refuse("must have an entry in text.tokens")
        if (count := manifest.tokens_of(encoder).length) != manifest.tokens.length:
            raise (
                m["text"]
                .member("tokens")
                .member(encoder)
                .refuse(f"must be {manifest.tokens.length} tokens, not {count}")
            )
        names += list(manifest.networks[encoder].outputs)[1:]
    if len(set(names)) < len(names):
        raise m["networks"].refuse("must have different names for the outputs of text encoders")


def _text_shape(manifest: Manifest) -> tuple[int | str, ...]:
    """Shape of the text states: tokens, and the total width of all text encoders."""
    shapes = [_output_shape(manifest, encoder) for encoder in manifest.text_encoders]
    if len(shapes) == 1:
        return shapes[0]
    return (*shapes[0][:-1], sum(int(shape[-1]) for shape in shapes if shape and isinstance(shape[-1], int)))


def _output_shape(manifest: Manifest, network: str) -> tuple[int | str, ...]:
    return next((shape[1:] for _, shape in manifest.networks[network].outputs.values()), ())


def _check_tensor(value: Value, tensor: Tensor | None, kind: str, shape: tuple[int | str, ...] | None) -> None:
    """Refuse a tensor of another element kind or shape; a dynamic dimension matches any."""
    if tensor is None:
        raise value.refuse("must be present")
    dtype, dimensions = tensor[0], tensor[1][1:]
    if kind not in dtype:
        raise value.refuse(f"must have {kind} elements, not {dtype}")
    if shape is None:
        return
    fits = len(dimensions) == len(shape) and all(
        isinstance(d, str) or isinstance(w, str) or d == w for d, w in zip(dimensions, shape, strict=True)
    )
    if not fits:
        raise value.refuse(f"must have the shape {'x'.join(map(str, ('batch', *shape)))}, not "
                           f"{'x'.join(map(str, tensor[1]))}")  # fmt: skip

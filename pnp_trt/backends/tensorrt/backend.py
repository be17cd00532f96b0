"""TensorRT and TensorRT-RTX: engines compiled ahead, checked against version and GPU, run on bound device buffers.

Both share the code; ``flavour`` has the differences.  ``compile`` compiles, in a separate process, and ``network``
runs engines.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import memory
from ...bundle.compile_options import CompileOptions
from ...bundle.manifest import Manifest, NetworkRecord
from ...bundle.store import cache_home, engines_home, rebuild_advice
from ...errors import IncompatibleDevice, InputError, PnpError
from ...precision.int8.recipes import INT8_WEIGHTS
from ...precision.recipes import RECIPES
from ...sampling.network import Network
from ..base import Backend, Compiled, CompileJob, LoadOptions, Profile, Progress
from ..gpus import Gpu, present_gpus
from . import NEEDS, NEEDS_RTX
from .flavour import RTX, TENSORRT, Flavour

if TYPE_CHECKING:
    from ...sampling.device_loop import DeviceLoops

#: host memory for compiling: measured 0.55 GB for a U-Net of 27 MB, 5.8 GB for one of 1.72 GB
_MEMORY_FLOOR, _MEMORY_FACTOR = 600 << 20, 3.4
#: GPUs that a portable TensorRT-RTX engine runs on: Ampere and later, except data-centre Hopper
_PORTABLE = ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


def _has_float8(target: str) -> bool:
    """Whether a target has FP8 tensor cores: Ada (sm_89), Hopper (sm_90) and newer; False for portable."""
    number = target.removeprefix("sm_")
    return number.isdigit() and int(number) >= 89


class TensorRtBackend(Backend):
    """Base class of both flavours."""

    flavour: Flavour
    elements = frozenset({"float32", "float16", "bfloat16", "int8", "float8_e4m3fn"})
    #: static profiles, because a range of batch sizes leads to less fusion and more kernels (``once_and_twice``)
    profiles = ("b1", "b4")
    open_tokens = True

    def versions(self) -> dict[str, str]:
        return {self.flavour.distributions[0]: self.flavour.version()}

    def resolve_target(self, target: str | None, precision: str, options: CompileOptions) -> str:
        gpus = present_gpus()
        self.flavour.check_options(options, bool(gpus))
        resolved = self._target(target, gpus[0] if gpus else None)
        lacking = RECIPES[precision].elements - self.elements_of(resolved)
        if "bfloat16" in lacking:
            raise InputError(f"target {resolved} has no bfloat16; choose --precision fp16")
        if "float8_e4m3fn" in lacking:
            raise InputError(
                f"target {resolved} has no FP8, which needs sm_89 or newer; choose --target sm_89, or --precision fp16"
            )
        return resolved

    def elements_of(self, target: str) -> frozenset[str]:
        """All except bfloat16 on Turing (sm_75) and FP8 before Ada (sm_89); portable engines have no FP8 either."""
        lacking = {"bfloat16"} if target == "sm_75" else set()
        return self.elements - lacking - (set() if _has_float8(target) else {"float8_e4m3fn"})

    def _target(self, target: str | None, gpu: Gpu | None) -> str:
        known = self.flavour.targets
        if known:
            if target is not None and target not in known:
                raise InputError(f"target is '{target}'; {self.name} compiles for: {', '.join(known)}")
            if target is None and gpu is not None and gpu.sm not in _PORTABLE:
                own = f"add --target {gpu.sm}" if gpu.sm in known else "use --backend tensorrt"
                warnings.warn(
                    f"the engine will not run on the GPU here, which is {gpu.sm} ({gpu.name}): portable engines are "
                    f"for {', '.join(_PORTABLE)}; for this GPU {own}",
                    stacklevel=2,
                )
            return target or known[0]
        if gpu is None:
            raise InputError(
                f"backend '{self.name}' compiles only for the GPU in this machine, but no NVIDIA driver or GPU was "
                "found; build there, or use --backend tensorrt-rtx, which needs none"
            )
        if target not in (None, gpu.sm):
            raise InputError(
                f"target is '{target}' and the GPU here is {gpu.sm} ({gpu.name}); backend '{self.name}' compiles "
                "only for the GPU in this machine; leave --target out, or use --backend tensorrt-rtx"
            )
        return gpu.sm

    def prepare(self, graph: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        return {}  # TensorRT has layers for Attention and GroupNormalization

    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        return self._run(job, progress)

    def replace_weights(self, job: CompileJob, engine: Path, progress: Progress) -> Compiled:
        """Refit a refittable engine if a GPU here runs it; otherwise, or if refitting fails, compile again."""
        reason = None if job.options.refittable else "the engine was not built with --refittable"
        reason = reason or self.cannot_run(job.target, job.options)
        compiled = None
        if reason is None:
            try:
                compiled = self._run(job, progress, engine)
            except InputError:
                raise
            except PnpError as e:  # the parser may use weight names that are not in the graph
                reason = f"the refit failed ({str(e)[:300]})"
        compiled = compiled or self._run(job, progress)
        how = f"compiled again: {reason}" if reason else "refit"
        return replace(compiled, notes={**compiled.notes, "weights": how})

    def _run(self, job: CompileJob, progress: Progress, refit: Path | None = None) -> Compiled:
        """Compile ``job``, or refit the engine ``refit`` with the weights of its graph, in a separate process."""
        self.versions()
        if job.options.check_memory:
            check_memory(job)
        engine = job.graph.with_suffix(".engine")
        request = {
            "flavour": self.flavour.name,
            "graph": str(job.graph),
            "engine": str(engine),
            "refit": None if refit is None else str(refit),
            "inputs": {name: [dtype, list(shape)] for name, (dtype, shape) in job.inputs.items()},
            "profiles": [_compilable(p, job.target).as_dict() for p in job.profiles],
            "target": job.target,
            "options": asdict(job.options),
            "tensor_float32": job.tensor_float32,
            "timing_cache": self._timing_cache(),
        }
        result = _in_own_process(request, job.network, progress)
        return Compiled(engine.name, result.pop("seconds"), result.pop("peak_memory"), result)

    def _timing_cache(self) -> str | None:
        """Return the path of the timing cache, keyed by GPU and version because timings are specific to both."""
        gpus = present_gpus()
        if not self.flavour.has_timing_cache or not gpus:
            return None
        key = "-".join([self.flavour.version(), gpus[0].sm, *gpus[0].name.lower().split()])
        return str(cache_home() / "timing" / f"{key}.cache")

    def check(self, manifest: Manifest) -> None:
        name, advice = manifest.name, rebuild_advice(engines_home() / manifest.name, manifest.rebuild)
        lasting = manifest.options.version_compatible
        for package, here in self.versions().items():
            built = manifest.compiler.get(package, "none")
            if built != here and not (lasting and _later(here, built)):
                raise IncompatibleDevice(
                    f"engine '{name}': it was compiled with {package} {built}, but {here} is installed; {advice}"
                )
        if (reason := self.cannot_run(manifest.target, manifest.options)) is not None:
            raise IncompatibleDevice(
                f"engine '{name}': its target is {manifest.target}, but {reason}; "
                f"make one for this machine with: {self._for_here(manifest)}"
            )

    def _for_here(self, manifest: Manifest) -> str:
        """Return the command that builds an equivalent engine for this machine, with or without a GPU.

        The manifest is untrusted, so each of its commands is split, checked to be a command of this program, and
        quoted again word by word.
        """
        claims = [manifest.rebuild] if manifest.plugged is None else list(manifest.plugged.commands)
        first, *plugs = (_command_words(claim) for claim in claims)
        if first is None or first[1] != "build" or any(p is None or p[1] != "plug" or len(p) < 3 for p in plugs):
            return shlex.join(["pnp-trt", "build", "--out", f"{manifest.name}-here"])
        if manifest.plugged is None:
            return shlex.join(self._build_here(manifest, first))
        # a plugged engine is made from other engines, which must be built for this machine first
        folder = f"{Path(_option(first, '--out') or manifest.name)}-here"
        commands = [[*self._build_here(manifest, first), "--out", folder]]
        for words in filter(None, plugs):
            words[2], folder = folder, f"{_option(words, '--out') or manifest.name}-here"
            commands.append([*_without(words, "--out"), "--out", folder])
        return " && ".join(shlex.join(words) for words in commands)

    def _build_here(self, manifest: Manifest, words: list[str]) -> list[str]:
        """Return a build's command line with this machine's target and without ``--out``."""
        gpus = present_gpus()
        # ONNX Runtime ignores the batch sizes of profiles, but not the image sizes
        dropped = () if gpus or any(p.sized for p in manifest.profiles) else manifest.profiles
        for option in ("--target", "--out", *(("--profile",) * len(dropped))):
            words = _without(words, option)
        if not gpus:
            words = [*_without(words, "--backend"), "--backend", "onnxruntime"]
        elif gpus[0].sm in self.flavour.targets:
            words = [*words, "--target", gpus[0].sm]
        elif self.flavour.targets:  # this GPU is not among the targets; TensorRT compiles for any GPU that is present
            words = [*_without(words, "--backend"), "--backend", TENSORRT.name]
        return words

    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        gpus = present_gpus()
        if not gpus:
            return "no NVIDIA driver or GPU was found here"
        sm = gpus[0].sm
        if target == sm or (target == "portable" and sm in _PORTABLE):
            return None
        if options is not None and options.hardware_compatible and int(sm[3:]) >= _compute_capability(target) >= 80:
            return None
        return f"the GPU here is {sm} ({gpus[0].name})"

    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> Network:
        from .network import TrtNetwork

        if options.provider == "cpu":
            raise InputError(f"provider is 'cpu'; a {self.name} engine runs on the GPU: use auto or cuda")
        return TrtNetwork(self.flavour, path, network)

    def device_loops(self, unet: Any, vae: Any, condition: Any, name: str) -> DeviceLoops:
        from ..cuda_graph import device_loops

        return device_loops(unet.cuda, unet, vae, condition, name)


class TensorRt(TensorRtBackend):
    """``tensorrt`` 10.15 to 11.x: compiles for the GPU in this machine."""

    name = "tensorrt"
    label = "trt"
    flavour = TENSORRT
    needs = NEEDS


class TensorRtRtx(TensorRtBackend):
    """``tensorrt_rtx``: compiles for any GeForce or RTX GPU, on any machine."""

    name = "tensorrt-rtx"
    label = "rtx"
    flavour = RTX
    needs = NEEDS_RTX
    int8_one_scale = True

    def remark(self, precision: str) -> str | None:
        if precision != INT8_WEIGHTS.name:
            return None
        return (
            "int8-weights makes smaller files but slower steps: a separate kernel widens each weight in every "
            "evaluation; for speed choose fp16, int8 or fp8"
        )


def _command_words(claim: str) -> list[str] | None:
    """Split a `pnp-trt` command line into words; None for any other text."""
    try:
        words = shlex.split(claim)
    except ValueError:  # an unterminated quotation
        return None
    return words if words[:1] == ["pnp-trt"] and len(words) > 1 else None


def _option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words[:-1] else None


def _without(words: list[str], option: str) -> list[str]:
    """Return the words without the first occurrence of an option and its value."""
    i = words.index(option) if option in words else len(words)
    return words[:i] + words[i + 2 :]


def _compute_capability(target: str) -> int:
    """Return 89 for ``sm_89``; 0 for a target that is not a single GPU."""
    return int(target[3:]) if re.fullmatch(r"sm_[0-9]{2,3}", target) else 0


def check_memory(job: CompileJob) -> None:
    """Refuse a build that needs more memory than is free.

    Raises:
        InputError: if it does; the message has both amounts.
    """
    weights = job.graph.with_name(job.graph.name + ".data")
    needed = _MEMORY_FLOOR + _MEMORY_FACTOR * (weights.stat().st_size if weights.is_file() else 0)
    free = memory.free()
    if free < needed:
        raise InputError(
            f"compiling the {job.network} needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB "
            "are free; close what uses it, or pass --no-memory-check to try"
        )


def _compilable(profile: Profile, target: str) -> Profile:
    """Return the profile to compile for; the manifest still has the one requested.

    For sm_75, TensorRT-RTX 1.x cannot fuse the matrix products of a single image (``empty runtime-fusion MVMF for
    '__myl_Fc'``) if no larger batch is allowed; with a range of one to two the graph compiles, with kernels for one.
    """
    return replace(profile, maximum=2) if target == "sm_75" and profile.maximum == 1 else profile


def _in_own_process(request: dict[str, Any], network: str, progress: Progress) -> dict[str, Any]:
    """Run ``compile`` in a separate process and return its result.

    Raises:
        PnpError: if it fails; the message has its error, or its exit status.
    """
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.compile"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as child,
    ):  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            last: dict[str, Any] = {}
            for line in child.stdout:
                last = json.loads(line)
                if "progress" in last:
                    phase, share = last["progress"]
                    progress(phase, int(1000 * share), 1000)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        if code == 0 and "done" in last:
            done: dict[str, Any] = last["done"]
            return done
        if "error" in last:
            raise PnpError(last["error"])
        if code < 0:
            raise PnpError(
                f"the compiler of the {network} was killed by signal {-code}, most likely for lack of memory; "
                "nothing was written; close what uses memory and build again"
            )
        stderr.seek(0)
        tail = stderr.read().decode(errors="replace").strip().splitlines()
        raise PnpError(
            f"the compiler of the {network} ended with code {code}: {tail[-1] if tail else 'it printed nothing'}; "
            "nothing was written"
        )


def _later(here: str, built: str) -> bool:
    """Whether a version-compatible engine of ``built`` loads in ``here``: not older, and of the same major version."""
    a, b = ([int(n) for n in v.split(".") if n.isdigit()] for v in (here, built))
    return bool(a and b) and a[0] == b[0] and a >= b

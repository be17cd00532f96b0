"""The differences between ``tensorrt`` and ``tensorrt_rtx``; the rest of the backend is common to both.

Sources: the Python API of TensorRT 10.15 to 11.4 and of TensorRT-RTX 1.7.1 (docs.nvidia.com/deeplearning/tensorrt and
…/tensorrt-rtx), and the bindings of both.

| | tensorrt | tensorrt_rtx |
|---|---|---|
| compiles for | the GPU present; ``hardware_compatibility_level`` widens that | any: ``set_compute_capability`` |
| loads engines of | its own version; also earlier ones with VERSION_COMPATIBLE | its own version only |
| keeps between builds | a timing cache | nothing (its timing-cache calls would need a GPU) |
| keeps between runs | nothing | a runtime cache of kernels compiled for this GPU |
| can be captured | always | if built with REQUIRE_USER_ALLOCATION; see ``is_stream_capturable`` |
| checks a plan before loading | no | ``get_engine_validity`` |
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

from ...bundle.compile_options import CompileOptions
from ...errors import InputError, MissingDependency, PnpError
from ...version import installed


@dataclass(frozen=True)
class Flavour:
    """One of the two packages.

    Attributes:
        name: name of the backend.
        module: module to import.
        distributions: names of the distributions that may provide it; manifests record its version under the first.
        extra: the extra of pnp-trt that installs it.
        targets: targets that it compiles for on any machine; empty if it compiles only for the GPU that is present.
        oldest: oldest supported version.
        why_oldest: what earlier versions lack, as a clause.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    extra: str
    targets: tuple[str, ...] = ()
    oldest: tuple[int, int] = (0, 0)
    why_oldest: str = ""

    def load(self) -> Any:
        """Import the module.

        Raises:
            InputError: if it is not installed; the message has the command that installs it.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as e:  # OSError: its libraries are missing
            raise MissingDependency(
                f"backend '{self.name}' needs the package {self.distributions[0]} ({str(e).splitlines()[0]}); "
                f"install with: pip install 'pnp-trt[{self.extra}]'"
            ) from None

    def version(self) -> str:
        """Return its four-part version without importing it.

        Raises:
            InputError: if it is not installed, or too old.
        """
        for name, release in installed(self.distributions).items():
            if tuple(int(n) for n in release.split(".")[:2] if n.isdigit()) < self.oldest:
                raise InputError(
                    f"{name} is {release}, but backend '{self.name}' needs {'.'.join(map(str, self.oldest))} or later: "
                    f"{self.why_oldest}; install with: pip install --upgrade 'pnp-trt[{self.extra}]'"
                )
            return release
        raise MissingDependency(
            f"backend '{self.name}' needs the package {self.distributions[0]}, which is not installed; "
            f"install with: pip install 'pnp-trt[{self.extra}]'"
        )

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.module == "tensorrt_rtx"

    def check_options(self, options: CompileOptions, gpu: bool) -> None:
        """Refuse options that this flavour does not support.

        Args:
            gpu: whether a GPU is present.
        """
        if not self.rtx:
            return
        for name in ("version_compatible", "hardware_compatible"):
            if getattr(options, name):
                raise InputError(
                    f"--{name.replace('_', '-')} is for backend 'tensorrt'; TensorRT-RTX engines run only on the "
                    "release that built them, and on several GPUs with --target portable"
                )
        if options.refittable and not gpu:
            raise InputError(
                "--refittable was requested, but there is no GPU here, which TensorRT-RTX 1.7 needs to build "
                "refittable engines; leave it out, and the engine is compiled again for new weights"
            )

    def set_target(self, trt: Any, config: Any, target: str, options: CompileOptions) -> None:
        """Configure the GPU to compile for."""
        if not self.rtx:
            if options.hardware_compatible:
                config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
            return
        if target == "portable":  # the default: 8.0, 8.6, 8.9, 12.0 and later
            return
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, target.replace("_", "").upper())
        if not config.set_compute_capability(capability, 0):
            raise PnpError(f"TensorRT-RTX did not accept target {target}; see pnp-trt doctor")

    def log_layers(self, trt: Any, config: Any) -> None:
        """Make the builder log the layers of an engine, which ``layer_report`` reads."""
        if self.rtx:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    def allow_capture(self, trt: Any, config: Any) -> None:
        """Build engines that CUDA graphs can capture: they allocate nothing while they run."""
        if self.rtx and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # since 1.2
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    @property
    def has_timing_cache(self) -> bool:
        """Whether timings of tactics are kept between builds."""
        return not self.rtx

    def check_plan(self, trt: Any, runtime: Any, plan: Any, name: str) -> None:
        """Let the runtime check whether it can load a plan, before loading it."""
        if not self.rtx:
            return
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            flags = trt.EngineInvalidityDiagnostics.__members__.items()
            reasons = [n.lower().replace("_", " ") for n, flag in flags if int(diagnostics) & int(flag)]
            raise PnpError(f"TensorRT-RTX cannot load {name} here: {', '.join(reasons) or 'no reason given'}")

    def context(self, trt: Any, engine: Any, cache: bytes | None) -> tuple[Any, Any]:
        """Return an execution context and its runtime cache (None for a flavour without one).

        The workspace is allocated when a profile is set, and is that profile's.  By default each context would allocate
        the largest workspace of all profiles: for a batch of one that of a batch of eight.

        Args:
            cache: the output of ``cache.serialize()`` in an earlier run; the runtime rejects an incompatible one.
        """
        by_profile = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if not self.rtx:
            return engine.create_execution_context(by_profile), None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(by_profile)
        kernels = config.create_runtime_cache()
        if cache:
            accepted = kernels.deserialize(cache)
            if accepted is False:
                warnings.warn(
                    "the cached kernels of an earlier run were rejected, for example after a driver update; the first "
                    "image of each size compiles them again",
                    stacklevel=2,
                )
        config.set_runtime_cache(kernels)
        # by default, kernels for open shapes are compiled in the background while the first runs use slower ones; a
        # capture would keep the slower ones
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return engine.create_execution_context(config), kernels


TENSORRT = Flavour(
    "tensorrt",
    "tensorrt",
    ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt",
    oldest=(10, 15),
    why_oldest="10.12 and 10.13 cannot parse Attention, and 10.14 fails on heads of 512 (NVIDIA/TensorRT#4705)",
)
RTX = Flavour(
    "tensorrt-rtx",
    "tensorrt_rtx",
    ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "rtx",
    ("portable", "sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    oldest=(1, 5),
    why_oldest="1.2 fails on graphs of several Attentions, and 1.4 has no target sm_121",
)
FLAVOURS = {f.name: f for f in (TENSORRT, RTX)}

"""What differs between ``tensorrt`` and ``tensorrt_rtx``; every other line of the backend serves both.

Sources: the Python API of TensorRT 10.15 to 11.4 and of TensorRT-RTX 1.7.1 (docs.nvidia.com/deeplearning/tensorrt and
…/tensorrt-rtx), and the bindings of both.

| | tensorrt | tensorrt_rtx |
|---|---|---|
| compiles for | the GPU present; ``hardware_compatibility_level`` widens that | any: ``set_compute_capability`` |
| loads engines of | its own version; later ones with VERSION_COMPATIBLE | its own version alone |
| keeps between builds | a timing cache | nothing (its timing-cache calls would ask for a GPU) |
| keeps between runs | nothing | a runtime cache of kernels made for this GPU |
| can be captured | always | built with REQUIRE_USER_ALLOCATION; ``is_stream_capturable`` tells |
| asks of a plan | nothing | ``get_engine_validity`` |
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
    """One of the two.

    Attributes:
        name: of the backend.
        module: to import.
        distributions: names under which it is installed; the first one's version is requested.
        extra: of pnp-trt that installs it.
        targets: that it compiles for on any machine; empty where it compiles for the GPU that is present.
        oldest: version that can be used.
        why_oldest: what earlier ones lack, as a clause.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    extra: str
    targets: tuple[str, ...] = ()
    oldest: tuple[int, int] = (0, 0)
    why_oldest: str = ""

    def load(self) -> Any:
        """The module.

        Raises:
            InputError: if it is not installed, with the command that installs it.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as e:  # OSError: its libraries are not there
            raise MissingDependency(
                f"backend '{self.name}' needs the package {self.distributions[0]} ({str(e).splitlines()[0]}); "
                f"install with: pip install 'pnp-trt[{self.extra}]'"
            ) from None

    def version(self) -> str:
        """Its four-part version; nothing is imported.

        Raises:
            InputError: if it is not installed, or too old.
        """
        for name, found in installed(self.distributions).items():
            if tuple(int(n) for n in found.split(".")[:2] if n.isdigit()) < self.oldest:
                raise InputError(
                    f"{name} is {found}, and backend '{self.name}' needs {'.'.join(map(str, self.oldest))} or later: "
                    f"{self.why_oldest}; install with: pip install --upgrade 'pnp-trt[{self.extra}]'"
                )
            return found
        raise MissingDependency(
            f"backend '{self.name}' needs the package {self.distributions[0]}, which is not installed; "
            f"install with: pip install 'pnp-trt[{self.extra}]'"
        )

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.module == "tensorrt_rtx"

    def check_options(self, options: CompileOptions, gpu: bool) -> None:
        """Refuse what this flavour cannot do.

        Args:
            gpu: whether one is present.
        """
        if not self.rtx:
            return
        for name in ("version_compatible", "hardware_compatible"):
            if getattr(options, name):
                raise InputError(
                    f"--{name.replace('_', '-')} is for backend 'tensorrt'; TensorRT-RTX engines run on the release "
                    "that made them, and on several GPUs with --target portable"
                )
        if options.refittable and not gpu:
            raise InputError(
                "--refittable was requested and no GPU is here: TensorRT-RTX 1.7 makes refittable engines only where "
                "one is; leave it out, new weights are then compiled in"
            )

    def set_target(self, trt: Any, config: Any, target: str, options: CompileOptions) -> None:
        """Say which GPU to compile for."""
        if not self.rtx:
            if options.hardware_compatible:
                config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
            return
        if target == "portable":  # none set: 8.0, 8.6, 8.9, 12.0 and later
            return
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, target.replace("_", "").upper())
        if not config.set_compute_capability(capability, 0):
            raise PnpError(f"TensorRT-RTX did not accept target {target}; see pnp-trt doctor")

    def log_layers(self, trt: Any, config: Any) -> None:
        """Have the builder log the layers of what it built; ``layer_report`` reads them."""
        if self.rtx:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    def allow_capture(self, trt: Any, config: Any) -> None:
        """Have engines made that CUDA graphs can capture: ones that allocate nothing while they run."""
        if self.rtx and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # since 1.2
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    @property
    def has_timing_cache(self) -> bool:
        """Whether tactics' timings are kept between builds."""
        return not self.rtx

    def check_plan(self, trt: Any, runtime: Any, plan: Any, name: str) -> None:
        """Ask the runtime itself whether it can load a plan, before it is loaded."""
        if not self.rtx:
            return
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            flags = trt.EngineInvalidityDiagnostics.__members__.items()
            reasons = [n.lower().replace("_", " ") for n, flag in flags if int(diagnostics) & int(flag)]
            raise PnpError(f"TensorRT-RTX cannot load {name} here: {', '.join(reasons) or 'it gives no reason'}")

    def context(self, trt: Any, engine: Any, cache: bytes | None) -> tuple[Any, Any]:
        """An execution context, and its runtime cache (None where there is none).

        Its workspace is that of the profile that is set, allocated when it is set.  By default each context would hold
        the largest of all profiles: a batch of one the workspace of a batch of eight.

        Args:
            cache: what ``cache.serialize()`` gave in an earlier run; the runtime rejects one that does not fit.
        """
        by_profile = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if not self.rtx:
            return engine.create_execution_context(by_profile), None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(by_profile)
        kernels = config.create_runtime_cache()
        if cache:
            taken = kernels.deserialize(cache)
            if taken is False:
                warnings.warn(
                    "the kernels that an earlier run made were rejected, as after an update of the driver; the first "
                    "image of each size compiles them again",
                    stacklevel=2,
                )
        config.set_runtime_cache(kernels)
        # by default kernels of open shapes are made beside the first runs, which use slower ones until then; a capture
        # would keep the slower ones for good
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

"""Loaded networks that are PyTorch modules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.manifest import TOKENS, NetworkRecord
from ...bundle.profiles import Size
from ...errors import InputError, PnpError
from ...sampling.network import Bound, Description, TokenNetwork, check_input
from ..base import LoadOptions
from ..per_shape import check_shape, has_open_tokens

if TYPE_CHECKING:
    from torch import nn

#: graphs that torch.compile may keep per function: one for each batch size of each loaded network
_MOST_GRAPHS = 256
#: taken by compiled code on a GPU: while one thread compiles, PyTorch would trace the calls of other threads too
_COMPILED = threading.Lock()


def device(provider: str = "auto") -> str:
    """Resolve ``auto``, ``cpu`` or ``cuda`` to ``cpu`` or ``cuda``.

    Raises:
        InputError: for any other value, or for ``cuda`` if PyTorch finds no GPU.
    """
    import torch

    if provider not in ("auto", "cpu", "cuda"):
        raise InputError(f"provider is '{provider}'; known: auto, cpu, cuda")
    usable = torch.cuda.is_available()
    if provider == "cuda" and not usable:
        raise InputError(
            f"provider 'cuda' was requested, but torch {torch.__version__} finds no GPU; use --provider cpu, "
            "see pnp-trt doctor"
        )
    return "cuda" if usable and provider != "cpu" else "cpu"


@dataclass(frozen=True)
class Convolutions:
    """How convolutions run on a GPU, in half precision and in compiled code.

    Attributes:
        channels_last: store weights in the layout that cuDNN's tensor-core kernels read (PyTorch's notes on channels
            last).  Measured on an H200, eager, in float16, a step of SD 1.5's U-Net at 512² takes 7.3 ms, and 9.5 ms
            without.  Compiled code uses this layout in every precision, and would copy other weights into it in every
            run (``require_channels_last`` in Inductor's lowering of convolutions).
        search: time cuDNN's algorithms in the first run of each batch size and image size and keep the fastest, which
            later runs and captures reuse.  The winner may differ between processes, and with it the last bits of the
            results.  In the same measurement it brought no gain.
    """

    channels_last: bool = True
    search: bool = False


class TorchNetwork(TokenNetwork):
    """One module on one device; may be shared between threads.

    Args:
        module: the module that the file describes, if it exists already; its weights are used unchanged.
        convolutions: settings for modules on a GPU that are in half precision or compiled.

    ``torch.compile`` compiles on the first run of a batch size.  For the bundled U-Net on one CPU core this takes one
    to two minutes, and ten seconds in later processes, because PyTorch caches the code (``TORCHINDUCTOR_CACHE_DIR``).
    """

    def __init__(
        self,
        path: Path,
        entry: NetworkRecord,
        options: LoadOptions,
        module: nn.Module | None = None,
        convolutions: Convolutions | None = None,
    ) -> None:
        import torch

        from ...models.rebuild import rebuild
        from ...precision.recipes import recipe
        from ...precision.wide_products import emulated

        self.path = path
        self.device = device(options.provider)
        self.compiled = entry.compiled.notes.get("mode") == "compile"
        if options.threads:
            torch.set_num_threads(options.threads)
        if self.device == "cuda":  # fp32 means full float32, as on every backend
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if module is None:
            module = rebuild(path.with_suffix(".json"), path)
        module = recipe(entry.precision).convert(module).to(self.device)
        self._search, self._seen = False, set[tuple[Any, ...]]()
        if self.device == "cuda" and (entry.precision in ("fp16", "bf16") or self.compiled):
            convolutions = convolutions or Convolutions()
            if convolutions.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._search = convolutions.search
        self._wide = self.device == "cpu" and not self.compiled and emulated(module)
        self._call: Any = _compile(module, self.device) if self.compiled else module
        self.open_tokens = has_open_tokens(entry)
        self._described = Description(
            dict(entry.inputs),
            dict(entry.outputs),
            "cuda:0" if self.device == "cuda" else "cpu",
            entry.profiles,
        )

    def describe(self) -> Description:
        return self._described

    @contextlib.contextmanager
    def bind_tokens(self, batch: int, size: Size | None, tokens: int | None) -> Iterator[TorchBound]:
        check_shape(self.path, self._described.profiles, batch, size)
        yield TorchBound(self, batch, size, tokens)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Return the output for tensors on the device; a tuple if the module has several outputs.

        Raises:
            PnpError: if memory runs out, or torch.compile fails.
        """
        if not self.compiled:
            return self._run(inputs)
        if self.device == "cuda":  # in the caller's thread, whose current stream may be capturing
            with _COMPILED:
                return self._run(inputs)
        return _one_thread().submit(self._run, inputs).result()

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        import torch

        from ...precision.wide_products import wide_products

        try:
            # wide_products cannot intercept operations in inference_mode
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad() if self._wide else torch.inference_mode())
                if self._wide:
                    stack.enter_context(wide_products())
                if self._search:
                    stack.enter_context(self._searching(inputs))
                return self._call(**inputs)
        except torch.OutOfMemoryError as e:
            raise PnpError(f"{self.path.name} does not fit into the GPU's memory; generate fewer images at once") from e
        except Exception as e:  # the compiler's errors have many types
            if not self.compiled:
                raise
            reason = (str(e).splitlines() or ["no reason given"])[0]
            raise PnpError(
                f"torch.compile failed on {self.path.name} ({type(e).__name__}: {reason}); build with --target eager"
            ) from e

    @contextlib.contextmanager
    def _searching(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Let cuDNN time its algorithms for new shapes; a shape is never new in a capture."""
        import torch

        shapes = tuple(sorted((name, *value.shape) for name, value in inputs.items()))
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or shapes not in self._seen
        self._seen.add(shapes)
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


class TorchBound(Bound):
    """Input tensors at fixed addresses, for one batch size and image size."""

    def __init__(self, network: TorchNetwork, batch: int, size: Size | None, tokens: int | None = None) -> None:
        import torch

        self._network = network
        known: dict[Any, int] = {"batch": batch} | dict(zip(("height", "width"), size or (), strict=False))
        known |= {} if tokens is None else {TOKENS: tokens}
        self._inputs = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, (dtype, shape) in network.describe().inputs.items():
            if unknown := [d for d in shape if isinstance(d, str) and d not in known]:
                raise InputError(
                    f"{name} has an open {' and '.join(unknown)}; bind it with the latents' size and the tokens"
                )
            self._shapes[name] = tuple(int(known.get(d, d)) for d in shape)
            self._inputs[name] = torch.zeros(self._shapes[name], dtype=getattr(torch, dtype), device=network.device)
        self._output: Any = None

    def write(self, **inputs: np.ndarray) -> None:
        import torch

        for name, array in inputs.items():
            check_input(name, array, self._shapes)
            # a copy, because broadcast arrays cannot be wrapped
            self._inputs[name].copy_(torch.from_numpy(np.array(array)))

    def run(self) -> None:
        self._output = self._network.run(self._inputs)

    def read(self) -> np.ndarray:
        return self.read_all()[0]

    def read_all(self) -> tuple[np.ndarray, ...]:
        outputs = self._output if isinstance(self._output, tuple) else (self._output,)
        return tuple(value.cpu().numpy().copy() for value in outputs)  # the next run may overwrite the buffers


def _compile(module: Any, device: str) -> Any:
    import torch

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _MOST_GRAPHS)
    # the sampler captures whole loops, into which Inductor's CUDA graphs (mode "reduce-overhead", or set from outside)
    # could not be captured
    options: Any = {"triton.cudagraphs": False} if device == "cuda" else None
    # fail on graph breaks, whose parts would silently run eagerly
    return torch.compile(module, fullgraph=True, dynamic=False, options=options)


@cache
def _one_thread() -> ThreadPoolExecutor:
    """Return the only thread that compiles and runs code for the CPU, so that there is one OpenMP thread pool."""
    return ThreadPoolExecutor(1, "torch-compile")

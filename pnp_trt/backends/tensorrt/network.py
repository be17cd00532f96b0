"""A loaded engine and its buffers on the GPU (``enqueueV3``, in Python ``execute_async_v3``)."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.manifest import TOKENS, NetworkRecord
from ...bundle.profiles import tightest
from ...bundle.store import cache_home, digest, write_bytes
from ...errors import InputError, PnpError
from ...sampling.network import Bound, Description, TokenNetwork, check_input
from ..base import Size
from ..cuda import Cuda
from ..per_shape import has_open_tokens
from .facts import facts
from .flavour import Flavour
from .logger import message_logger


class TrtNetwork(TokenNetwork):
    """One loaded engine.

    Buffers and execution contexts are kept for the most recent shapes, because creating them takes longer than a step.

    Args:
        entry: the network's entry in the manifest, which the engine must match.

    Raises:
        InputError: if there is no GPU, or the engine does not match the manifest.
        PnpError: if the runtime rejects the engine.
    """

    KEEP = 4

    def __init__(self, flavour: Flavour, path: Path, entry: NetworkRecord, cuda: Cuda | None = None) -> None:
        self.path = path
        self.profiles = entry.profiles
        self.open_tokens = has_open_tokens(entry)
        self._flavour = flavour
        self._cuda = cuda or Cuda()
        self._trt = flavour.load()
        self._log = message_logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._deserialize(bool(entry.compiled.notes.get("host_code", False)))
        self._described = self._check(entry)
        self._idle: list[TrtBound] = []
        self._lock = threading.Lock()

    @property
    def cuda(self) -> Cuda:
        """The CUDA interface that allocates the buffers."""
        return self._cuda

    def _deserialize(self, host_code: bool) -> Any:
        if host_code:  # a version-compatible plan contains its own lean runtime
            self._runtime.engine_host_code_allowed = True
        with self.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._flavour.check_plan(self._trt, self._runtime, plan, self.path.name)
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise PnpError(self._log.summary(f"{self._flavour.name} cannot load {self.path}"))
        return engine

    def _check(self, entry: NetworkRecord) -> Description:
        trt, engine = self._trt, self._engine
        actual: dict[str, dict[str, tuple[str, tuple[int | str, ...]]]] = {"inputs": {}, "outputs": {}}
        sides = {"inputs": entry.inputs, "outputs": entry.outputs}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            side = "inputs" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "outputs"
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
            shape: list[int | str] = [int(d) for d in tuple(engine.get_tensor_shape(name))[1:]]
            # open dimensions are -1 in the engine, and names in the manifest
            names = sides[side].get(name, ("", ()))[1][1:]
            if len(names) == len(shape):
                shape = [n if d == -1 and isinstance(n, str) else d for d, n in zip(shape, names, strict=True)]
            actual[side][name] = (dtype, ("batch", *shape))
        for side, tensors in actual.items():
            expected = dict(sides[side])
            if tensors != expected:
                raise InputError(f"{self.path} has {side} {tensors}, its manifest states {expected}; build it again")
        if engine.num_optimization_profiles != len(self.profiles):
            raise InputError(
                f"{self.path} has {engine.num_optimization_profiles} profiles, "
                f"its manifest states {len(self.profiles)}; build it again"
            )
        return Description(actual["inputs"], actual["outputs"], "cuda:0", self.profiles)

    def describe(self) -> Description:
        return self._described

    def facts(self) -> dict[str, int]:
        return facts(self._trt, self._engine)

    def profile_for(self, batch: int, size: Size | None = None, tokens: int | None = None) -> int:
        """Return the index of the tightest profile for ``batch``, ``size`` (in latents) and ``tokens``."""
        index = tightest(self.profiles, lambda p: p.holds(batch, size, tokens))
        if index is None:
            sized = any(p.sized for p in self.profiles)
            requested = f"{batch}" + (f" of {size[0]}x{size[1]} latents" if sized and size else "")
            legal = ", ".join(
                f"{p.minimum} to {p.maximum}{' of ' if p.sized else ''}{p.sizes()}" for p in self.profiles
            )
            advice = f"--profile b{batch}" + ("@HEIGHTxWIDTH in pixels" if sized else "")
            if any(p.holds(batch, size) for p in self.profiles):
                longest = max(p.tokens[2] for p in self.profiles if p.tokens is not None)
                raise InputError(
                    f"the text states have {tokens} tokens; {self.path.name} was compiled for up to {longest}; build "
                    f"with --tokens {tokens}"
                )
            raise InputError(
                f"the batch is {requested}; {self.path.name} was compiled for {legal}; build with {advice}"
            )
        return index

    @contextlib.contextmanager
    def bind_tokens(self, batch: int, size: Size | None, tokens: int | None) -> Iterator[TrtBound]:
        tokens = tokens if self.open_tokens else None
        index = self.profile_for(batch, size, tokens)
        with self._lock:
            bound = next((b for b in self._idle if (b.batch, b.size, b.tokens) == (batch, size, tokens)), None)
            if bound is not None:
                self._idle.remove(bound)
        bound = bound or self._bound(batch, size, tokens, index)
        try:
            yield bound
        except BaseException:
            bound.close()  # its buffers may be in an undefined state
            raise
        with self._lock:
            self._idle.append(bound)
            spare = self._idle[: -self.KEEP]
            del self._idle[: -self.KEEP]
        for old in spare:
            old.close()

    def _bound(self, batch: int, size: Size | None, tokens: int | None, index: int) -> TrtBound:
        self._cuda.attach()  # the kernel cache needs the GPU to be current in this thread, which may be new
        file = self._kernels_file(batch, size, tokens)
        near = self._kernels_nearby(file)
        cached = near.read_bytes() if near is not None else None
        context, kernels = self._flavour.context(self._trt, self._engine, cached)
        if context is None:
            raise PnpError(self._log.summary(f"{self.path.name}: no execution context for a batch of {batch}"))

        def keep() -> None:
            """Store the kernels, which are compiled on the first run of a shape, for later processes."""
            if kernels is not None and ((data := bytes(kernels.serialize())) != cached or near != file):
                with contextlib.suppress(PnpError):  # without the cache, later processes only start more slowly
                    write_bytes(data, file)

        return TrtBound(self._cuda, context, self._described, batch, size, index, keep, tokens)

    def _kernels_file(self, batch: int, size: Size | None, tokens: int | None) -> Path:
        """Return the cache file for the kernels of one shape.

        Each shape has a separate file: contexts or processes that write the same file write the same kernels, and none
        overwrites those of another shape.
        """
        # GPU and driver are not in the key, because the runtime rejects a cache of others
        key = digest([self._flavour.name, self._trt.__version__, str(self.path.resolve()), self.path.stat().st_size])
        shape = "x".join(map(str, (batch, *(size or ()), *(() if tokens is None else (f"{tokens}t",)))))
        return cache_home() / "kernels" / f"{key[:32]}-{shape}.cache"

    def _kernels_nearby(self, file: Path) -> Path | None:
        """Return ``file``, else the newest cache of another shape (shapes share kernels), or None."""
        if file.is_file():
            return file
        others = file.parent.glob(f"{file.name.rpartition('-')[0]}-*.cache")
        with contextlib.suppress(OSError):  # a file was removed meanwhile
            return max(others, key=lambda other: other.stat().st_mtime, default=None)
        return None


class TrtBound(Bound):
    """One execution context with a separate stream, and device buffers whose addresses never change.

    ``addresses`` and ``stream`` are for capturing runs into a CUDA graph.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: Any,
        description: Description,
        batch: int,
        size: Size | None,
        profile: int,
        keep_kernels: Any,
        tokens: int | None = None,
    ) -> None:
        self.batch, self.size, self.tokens = batch, size, tokens
        self.stream = cuda.stream()
        self.addresses: dict[str, int] = {}
        self._cuda, self._context, self._keep = cuda, context, keep_kernels
        self._host: dict[str, tuple[np.ndarray, int]] = {}
        self._inputs: dict[str, tuple[int, ...]] = {}
        self._outputs = tuple(description.outputs)
        self.output_name = self._outputs[0]
        self._on_the_way: set[str] = set()
        self._ran = False
        try:
            self._prepare(description, profile)
        except BaseException:
            self.close()
            raise

    def _prepare(self, description: Description, profile: int) -> None:
        _must(self._context.set_optimization_profile_async(profile, self.stream), f"choose profile {profile}")
        self._cuda.synchronize(self.stream)
        known = {"batch": self.batch} | (dict(zip(("height", "width"), self.size, strict=True)) if self.size else {})
        known |= {} if self.tokens is None else {TOKENS: self.tokens}
        for name, (_, shape) in description.inputs.items():
            if unknown := [d for d in shape if isinstance(d, str) and d not in known]:
                raise InputError(
                    f"{name} has an open {' and '.join(unknown)}; bind it with the latents' size and the tokens"
                )
            full = tuple(known[d] if isinstance(d, str) else d for d in shape)
            self._inputs[name] = full
            _must(self._context.set_input_shape(name, full), f"set {name} to {full}")
        missing = self._context.infer_shapes()
        if missing:
            raise PnpError(f"the engine's shapes also depend on {', '.join(missing)}, which cannot be set")
        for name, (dtype, shape) in (*description.inputs.items(), *description.outputs.items()):
            if all(d in known for d in shape if isinstance(d, str)):
                full = tuple(known[d] if isinstance(d, str) else d for d in shape)
            else:  # derived from the inputs, such as an image's size from that of its latents
                full = tuple(int(d) for d in self._context.get_tensor_shape(name))
            self._host[name] = self._cuda.pinned(full, dtype)
            self.addresses[name] = self._cuda.allocate(self._host[name][0].nbytes)
            _must(self._context.set_tensor_address(name, self.addresses[name]), f"bind {name}")

    def write(self, **inputs: np.ndarray) -> None:
        for name, array in inputs.items():
            check_input(name, array, self._inputs)
            host, address = self._host[name]
            if name in self._on_the_way:  # the previous copy may still read the staging memory
                self._wait()
            np.copyto(host, array, casting="same_kind")
            self._cuda.to_device(self.addresses[name], address, host.nbytes, self.stream)
            self._on_the_way.add(name)

    def run(self) -> None:
        _must(self._context.execute_async_v3(self.stream), "run")
        if not self._ran:
            self._wait()
            self.keep_kernels()

    def enqueue(self, stream: int) -> None:
        """Enqueue one run on another stream, without waiting."""
        _must(self._context.execute_async_v3(stream), "run")

    def keep_kernels(self) -> None:
        """Store the kernels compiled by the first run for later processes; call it after waiting for a run."""
        if not self._ran:
            self._keep()
            self._ran = True

    def capturable(self, stream: int) -> bool:
        """Whether a run can be captured into a CUDA graph; True if the runtime has no such query."""
        query = getattr(self._context, "is_stream_capturable", None)  # only in TensorRT-RTX
        return True if query is None else bool(query(stream))

    def staged(self, name: str) -> np.ndarray:
        """Return the pinned host memory of a tensor, which has its shape and type."""
        return self._host[name][0]

    def read(self) -> np.ndarray:
        return self._read((self.output_name,))[0]

    def read_all(self) -> tuple[np.ndarray, ...]:
        return self._read(self._outputs)

    def _read(self, names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        for name in names:
            host, address = self._host[name]
            self._cuda.to_host(address, self.addresses[name], host.nbytes, self.stream)
        self._wait()
        return tuple(self._host[name][0].copy() for name in names)

    def _wait(self) -> None:
        self._cuda.synchronize(self.stream)
        self._on_the_way.clear()

    def close(self) -> None:
        """Free the buffers."""
        self._context = None
        hosts, self._host = [address for _, address in self._host.values()], {}
        devices, self.addresses = list(self.addresses.values()), {}
        self._cuda.free(devices, hosts, self.stream)


def _must(worked: bool, what: str) -> None:
    if not worked:
        raise PnpError(f"TensorRT could not {what}; see pnp-trt doctor, and pnp-trt inspect for what the engine takes")

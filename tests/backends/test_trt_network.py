"""An engine's buffers, on a fake GPU in host memory.

The fakes define only names that exist in the real bindings; the engine computes ``x + 1``.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnp_trt.backends.base import Profile
from pnp_trt.backends.cuda import Cuda
from pnp_trt.backends.tensorrt.flavour import RTX, TENSORRT
from pnp_trt.backends.tensorrt.network import TrtNetwork
from pnp_trt.bundle.manifest import NetworkParity, NetworkRecord
from pnp_trt.errors import InputError, PnpError

trt = pytest.importorskip("tensorrt_rtx")


class HostCuda(Cuda):
    """Records its allocations in host memory; copies happen immediately."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.waits = 0
        self.attached: set[int] = set()

    def attach(self) -> None:
        self.attached.add(threading.get_ident())

    def stream(self) -> int:
        return 7

    def synchronize(self, stream: int) -> None:
        self.waits += 1

    def allocate(self, size: int) -> int:
        raw = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(raw)] = raw
        return ctypes.addressof(raw)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, int]:
        array = np.zeros(shape, dtype)
        self.held[array.ctypes.data] = array
        return array, array.ctypes.data

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        ctypes.memmove(device, host, size)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        ctypes.memmove(host, device, size)

    def free(self, devices: list[int], hosts: list[int], stream: int) -> None:
        for address in (*devices, *hosts):
            del self.held[address]


class Real:
    """A fake whose methods must exist in the real class."""

    real: Any

    def __init_subclass__(cls) -> None:
        names = [n for n in vars(cls) if not n.startswith("_") and n != "real" and callable(vars(cls)[n])]
        assert all(hasattr(cls.real, n) for n in names), names


class Context(Real):
    real = trt.IExecutionContext

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._at: dict[str, int] = {}
        self._profile = -1
        self._fails = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self._shape))
        x, y = ((ctypes.c_float * count).from_address(self._at[n]) for n in ("x", "y"))
        for i in range(count):
            y[i] = x[i] + 1
        return not self._fails


class Cache(Real):
    real = trt.IRuntimeCache
    _accepts = True

    def __init__(self) -> None:
        self._data = b""
        self._given_in: int | None = None

    def serialize(self) -> bytes:
        return self._data or b"kernel"

    def deserialize(self, blob: bytes) -> bool:
        self._data = bytes(blob) if self._accepts else b""
        self._given_in = threading.get_ident()
        return self._accepts


class Config(Real):
    real = trt.IRuntimeConfig

    def __init__(self) -> None:
        self._cache = Cache()

    def create_runtime_cache(self) -> Cache:
        return self._cache

    def set_runtime_cache(self, cache: Cache) -> bool:
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class Engine(Real):
    real = trt.ICudaEngine

    def __init__(self) -> None:
        self._contexts: list[Context] = []
        self._configs: list[Config] = []
        self._given: list[Any] = []
        self.num_io_tensors, self.num_optimization_profiles = 2, 2

    def get_tensor_name(self, i: int) -> str:
        return "xy"[i]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return trt.float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def create_runtime_config(self) -> Config:
        self._configs.append(Config())
        return self._configs[-1]

    def create_execution_context(self, argument: Any = None) -> Context:
        self._given.append(argument)
        self._contexts.append(Context())
        return self._contexts[-1]


ENTRY = NetworkRecord(
    graph="x.onnx",
    precision="fp32",
    inputs={"x": ("float32", ("batch", 3))},
    outputs={"y": ("float32", ("batch", 3))},
    parity=NetworkParity(0.0, 1e-4, 1),
    file="x.engine",
    profiles=(Profile("b1", 1, 1, 1), Profile("b1-4", 1, 4, 4)),
)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrtNetwork:
    monkeypatch.setenv("PNP_TRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TrtNetwork, "_deserialize", lambda self, host_code: Engine())
    (tmp_path / "x.engine").write_bytes(b"plan")
    return TrtNetwork(RTX, tmp_path / "x.engine", ENTRY, HostCuda())


def test_buffers_keep_their_addresses(network: TrtNetwork) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with network.bind(2) as bound:
        bound.write(x=x)
        before = dict(bound.addresses)
        for _ in range(2):
            bound.run()
            assert np.array_equal(bound.read(), x + 1)
        bound.write(x=x * 2)
        bound.run()
        first = bound.read()
        bound.write(x=x * 3)
        bound.run()
        assert np.array_equal(first, x * 2 + 1)  # a copy, not the buffer
        assert bound.addresses == before
    assert np.array_equal(network(x=x), x + 1)
    assert len(network._engine._contexts) == 1  # the same batch size reuses the buffers
    assert network.describe().inputs == {"x": ("float32", ("batch", 3))}


def test_the_tightest_profile_is_chosen(network: TrtNetwork) -> None:
    for batch, index in ((1, 0), (2, 1), (4, 1)):
        with network.bind(batch):
            assert network._engine._contexts[-1]._profile == index
    with pytest.raises(InputError, match="the batch is 5; x.engine was compiled for 1 to 1, 1 to 4; .*--profile b5"):
        network(x=np.zeros((5, 3), np.float32))


class SizedEngine(Engine):
    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 2, -1, -1)


def test_open_sizes_are_bound_by_the_tightest_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PNP_TRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TrtNetwork, "_deserialize", lambda self, host_code: SizedEngine())
    (tmp_path / "x.engine").write_bytes(b"plan")
    square = Profile("b1-4@32x32", 1, 4, 4, (4, 4, 4), (4, 4, 4))
    free = Profile("b1-2@32-64", 1, 2, 2, (4, 4, 8), (4, 4, 8), 2)
    entry = replace(
        ENTRY,
        inputs={"x": ("float32", ("batch", 2, "height", "width"))},
        outputs={"y": ("float32", ("batch", 2, "image_height", "image_width"))},
        profiles=(free, square),
    )
    network = TrtNetwork(RTX, tmp_path / "x.engine", entry, HostCuda())
    for batch, size, index in ((1, (4, 4), 1), (4, (4, 4), 1), (2, (4, 8), 0), (1, (6, 6), 0)):
        x = np.random.default_rng(0).standard_normal((batch, 2, *size), np.float32)
        assert np.array_equal(network(x=x), x + 1)
        assert network._engine._contexts[-1]._profile == index and network._engine._contexts[-1]._shape == x.shape
    contexts = len(network._engine._contexts)
    with network.bind(1, (6, 6)) as bound:  # the same shape reuses the buffers
        assert bound.size == (6, 6) and len(network._engine._contexts) == contexts
    legal = r"compiled for 1 to 2 of 4-8x4-8 in steps of 2, 1 to 4 of 4x4; build with --profile b4@HEIGHTxWIDTH"
    for batch, size in ((4, (4, 8)), (4, (5, 5)), (4, (10, 4))):
        with pytest.raises(InputError, match=rf"batch is 4 of {size[0]}x{size[1]} latents; x.engine was {legal}"):
            network(x=np.zeros((batch, 2, *size), np.float32))
    with pytest.raises(InputError, match="x has an open height and width"), network.bind(1):
        pass
    cuda: Any = network._cuda
    assert len(cuda.held) == 4 * len(network._idle)  # failed calls keep no buffers


def test_two_users_get_separate_buffers_and_surplus_ones_are_freed(network: TrtNetwork) -> None:
    with network.bind(2) as a, network.bind(2) as b:
        assert set(a.addresses.values()).isdisjoint(b.addresses.values())
    for batch in (1, 2, 3, 4):
        network(x=np.zeros((batch, 3), np.float32))
    assert len(network._idle) == network.KEEP
    cuda: Any = network._cuda
    assert len(cuda.held) == network.KEEP * 4
    with pytest.raises(RuntimeError), network.bind(4):
        raise RuntimeError("what was under way may have left the buffers in any state")
    assert len(cuda.held) == (network.KEEP - 1) * 4


def test_a_second_write_waits_for_the_first_copy(network: TrtNetwork) -> None:
    cuda: Any = network._cuda
    with network.bind(1) as bound:
        x = np.zeros((1, 3), np.float32)
        bound.write(x=x)
        waits = cuda.waits
        bound.write(x=x)
        assert cuda.waits == waits + 1


def test_wrong_inputs_are_refused(network: TrtNetwork) -> None:
    with pytest.raises(InputError, match="no input 'z'; its inputs: x"), network.bind(1) as bound:
        bound.write(z=np.zeros(1))
    with pytest.raises(InputError, match=r"has shape \[2, 3\]; the network takes \[1, 3\]"), network.bind(1) as bound:
        bound.write(x=np.zeros((2, 3), np.float32))


def test_a_failed_run_is_an_error(network: TrtNetwork) -> None:
    with pytest.raises(PnpError, match="TensorRT could not run"), network.bind(1) as bound:
        network._engine._contexts[-1]._fails = True
        bound.run()


def test_kernels_are_kept_for_the_next_process(network: TrtNetwork, tmp_path: Path) -> None:
    network(x=np.zeros((1, 3), np.float32))
    (file,) = (tmp_path / "cache" / "kernels").iterdir()
    assert file.read_bytes() == b"kernel"
    again = TrtNetwork(RTX, network.path, ENTRY, HostCuda())
    again(x=np.zeros((1, 3), np.float32))
    assert again._engine._configs[-1]._cache._data == b"kernel"
    network(x=np.zeros((2, 3), np.float32))
    assert network._engine._configs[-1]._cache._data == b"kernel"  # another shape starts with them


def test_shapes_do_not_overwrite_each_others_kernels(network: TrtNetwork, tmp_path: Path) -> None:
    """Two processes start without a cache and write one after the other; in a shared file, the last would win."""
    other = TrtNetwork(RTX, network.path, ENTRY, HostCuda())
    with network.bind(1) as a, other.bind(2) as b:
        for bound, rows in ((a, 1), (b, 2)):
            bound.write(x=np.zeros((rows, 3), np.float32))
            bound.run()
    files = sorted((tmp_path / "cache" / "kernels").iterdir())
    assert [f.name.rpartition("-")[2] for f in files] == ["1.cache", "2.cache"]
    assert [f.read_bytes() for f in files] == [b"kernel", b"kernel"]


def test_a_context_allocates_only_its_profiles_memory(network: TrtNetwork) -> None:
    """By default, each context would allocate the memory of the largest profile."""
    network(x=np.zeros((1, 3), np.float32))
    strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    assert network._engine._configs[-1]._strategy == strategy and network._engine._contexts[-1]._profile == 0
    engine = Engine()
    context, kernels = TENSORRT.context(trt, engine, None)
    assert kernels is None and isinstance(context, Context) and engine._given == [strategy]


def test_the_gpu_is_current_where_kernels_are_read(network: TrtNetwork) -> None:
    """A new thread has no CUDA context, and without one the runtime rejects the cache."""
    network(x=np.zeros((1, 3), np.float32))
    thread = threading.Thread(target=lambda: network(x=np.zeros((2, 3), np.float32)))
    thread.start()
    thread.join()
    cuda: Any = network._cuda
    reader = network._engine._configs[-1]._cache._given_in
    assert reader is not None and reader != threading.get_ident() and reader in cuda.attached


def test_rejected_kernels_cause_a_warning(network: TrtNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    network(x=np.zeros((1, 3), np.float32))
    monkeypatch.setattr(Cache, "_accepts", False)
    with pytest.warns(UserWarning, match="cached kernels of an earlier run were rejected"):
        network(x=np.zeros((2, 3), np.float32))


def test_an_engine_that_does_not_match_its_manifest_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(TrtNetwork, "_deserialize", lambda self, host_code: Engine())
    for entry, message in (
        (replace(ENTRY, inputs={"x": ("float32", ("batch", 4))}), "its manifest states"),
        (replace(ENTRY, profiles=ENTRY.profiles[:1]), "has 2 profiles, its manifest states 1"),
    ):
        with pytest.raises(InputError, match=message):
            TrtNetwork(RTX, tmp_path / "x.engine", entry, HostCuda())


def test_the_bindings_have_what_the_backend_calls() -> None:
    """The names that the fakes above do not cover."""
    for kind, names in (
        (trt.Runtime, ("deserialize_cuda_engine", "get_engine_validity", "engine_host_code_allowed")),
        (trt.IBuilderConfig, ("create_timing_cache", "set_timing_cache", "get_timing_cache", "progress_monitor",
                              "hardware_compatibility_level", "clear_flag", "set_memory_pool_limit")),
        (trt.BuilderFlag, ("TF32", "REFIT", "VERSION_COMPATIBLE")),
        (trt.HardwareCompatibilityLevel, ("AMPERE_PLUS",)),
    ):  # fmt: skip
        assert [n for n in names if not hasattr(kind, n)] == []

"""Lower bound of the time on this device, from its measured peaks of arithmetic and bandwidth.

A network call cannot take less time than its multiply-accumulates at the device's peak, nor less than reading its
weights once at the device's bandwidth (Williams et al. 2009, "Roofline"). Both peaks are the best of several runs, as
other load on the machine can only lower them.

This module does not import torch if the device is a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import InputError, MissingDependency
from ...processor import usable_cores
from .cases import Case

#: sides of the square matrices that are multiplied; the best result counts
SIDES = (1024, 2048)
#: size of the weights in the vector-matrix product that measures bandwidth
BYTES = 256 * 2**20
SECONDS = 0.5

Clock = Callable[[], float]


@dataclass(frozen=True)
class Device:
    """Measured peaks of a device.

    peak_macs_per_s: multiply-accumulates per second in `precision`.  peak_bytes_per_s: bytes read per second.
    how: how they were measured, in one sentence.
    """

    name: str
    peak_macs_per_s: float
    peak_bytes_per_s: float
    how: str
    precision: str = "fp32"

    def as_dict(self) -> dict[str, Any]:
        """The device in the results document, where `how` states the precision."""
        return {key: value for key, value in asdict(self).items() if key != "precision"}


@dataclass(frozen=True)
class CallCost:
    """Arithmetic and weights of one network call.

    macs: multiply-accumulates of one row of the batch, attention products included.
    weight_bytes: bytes of the weights, which a call reads at least once at any batch size.
    precision: of the arithmetic; a peak in another precision gives no bound.
    """

    macs: int
    weight_bytes: int
    precision: str = "fp32"


def least_ms(macs: float, bytes_: float, device: Device) -> float:
    """Return the minimum milliseconds for `macs` multiply-accumulates and `bytes_` bytes on `device`."""
    return 1e3 * max(macs / device.peak_macs_per_s, bytes_ / device.peak_bytes_per_s)


def least_loop_ms(work: CallCost, calls: Iterable[tuple[int, int]], batch: int, device: Device) -> float:
    """Return the minimum milliseconds of a loop of `calls` (see `Case.calls`) for `batch` images."""
    return sum(count * least_ms(batch * rows * work.macs, work.weight_bytes, device) for count, rows in calls)


def work_of(cost_rows: Sequence[Mapping[str, Any]]) -> Callable[[Case], CallCost | None]:
    """Return a function that gives the cost of a case's network call, from the rows of `cost.cost_rows` of its base.

    The cost is None if it is unknown: for pipelines without a bundle or `weight_bytes`, and for networks not counted.
    A guide counts as `guide-full` if the bundle has a separate network for the part that depends only on w, otherwise
    as `guide-tiny`.
    """
    macs = {str(row["network"]): int(row["macs"]) for row in cost_rows}

    def find(case: Case) -> CallCost | None:
        pipe: Any = case.pipe
        bundle = getattr(pipe, "bundle", None)
        if bundle is None:
            weight = getattr(pipe, "weight_bytes", None)
            return None if weight is None or "teacher" not in macs else CallCost(macs["teacher"], weight)
        networks = bundle.manifest.networks
        needed = ["teacher"]
        if case.kind.guided:
            needed.append("guide-full" if "condition" in networks else "guide-tiny")
        if any(name not in macs for name in needed):
            return None
        return CallCost(
            sum(macs[name] for name in needed),
            bundle.manifest.size_of(bundle.manifest.networks["unet"].file),
            bundle.manifest.precision,
        )

    return find


def measure_device(
    *,
    provider: str = "cpu",
    precision: str = "fp32",
    sides: Sequence[int] = SIDES,
    bytes_: int = BYTES,
    seconds: float = SECONDS,
) -> Device:
    """Measure this device's peaks, in about four times `seconds`.

    provider: "cpu" or "cuda" (through torch).  precision: of the arithmetic; "fp32" on the CPU, "fp32", "fp16" or
    "bf16" on a GPU.  sides: of the square matrices.  bytes_: size of the weights that are read.

    Raises InputError for another provider, an unsupported precision, or "cuda" if torch finds no GPU.
    """
    if provider == "cuda":
        return _cuda(precision, sides, bytes_, seconds)
    if provider != "cpu":
        raise InputError(f"provider is '{provider}'; a device can be measured as 'cpu' or 'cuda'")
    if precision != "fp32":
        raise InputError(f"precision is '{precision}'; a CPU's peak is measured in fp32 only")
    workers = usable_cores()
    try:
        product = _ort_product(workers)
        library = f"ONNX Runtime on {workers} thread{'s' if workers > 1 else ''}"
    except ImportError:  # the onnx package, which builds the graph, is not installed

        def product(a: np.ndarray, b: np.ndarray) -> Callable[[], object]:
            return lambda: a @ b

        library = "numpy with its own threads, as the package onnx is not installed"
    macs, bandwidth = _peaks(product, sides, bytes_, seconds)
    from ...bundle.provenance import provenance

    how = (
        f"best of repeated float32 products by {library}: square matrices of {' and '.join(map(str, sides))} for the "
        f"arithmetic, a vector times a matrix of {bytes_ / 2**20:.0f} MiB for the bytes"
    )
    return Device(str(provenance("")["cpu"]), macs, bandwidth, how)


def _peaks(
    product: Callable[[np.ndarray, np.ndarray], Callable[[], object]],
    sides: Sequence[int],
    bytes_: int,
    seconds: float,
) -> tuple[float, float]:
    """Measure multiply-accumulates and bytes per second, in float32."""
    rng = np.random.default_rng(0)
    macs = 0.0
    for side in sides:
        a, b = (rng.random((side, side), np.float32) for _ in range(2))
        macs = max(macs, side**3 / _best(product(a, b), seconds))
    width = 4096
    height = max(1, bytes_ // (width * 4))
    matrix = np.ones((height, width), np.float32)
    row = np.ones((1, height), np.float32)
    return macs, matrix.nbytes / _best(product(row, matrix), 2 * seconds)


def _best(run: Callable[[], object], seconds: float, clock: Clock = time.perf_counter) -> float:
    """Return the seconds of the fastest run, after one warm-up, of at least three runs and `seconds` in total."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = clock()
        run()
        times.append(max(clock() - start, 1e-9))
    return min(times)


def _ort_product(threads: int) -> Callable[[np.ndarray, np.ndarray], Callable[[], object]]:
    """Return a function that binds two matrices once and returns a call that multiplies them."""
    import onnx  # raises ImportError if it is not installed
    import onnxruntime as ort
    from onnx import TensorProto, helper

    def product(a: np.ndarray, b: np.ndarray) -> Callable[[], object]:
        shapes = {"a": a.shape, "b": b.shape, "c": (a.shape[0], b.shape[1])}
        values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()}
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [values["a"], values["b"]], [values["c"]]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        operands = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for x in (a, b)]
        out = ort.OrtValue.ortvalue_from_numpy(np.empty(shapes["c"], np.float32))
        for name, value in zip(("a", "b"), operands, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("c", out)
        return lambda: session.run_with_iobinding(binding)

    return product


def _cuda(precision: str, sides: Sequence[int], bytes_: int, seconds: float) -> Device:
    """Measure the first GPU's peaks through torch: a matrix product, and a copy, which reads and writes its bytes."""
    try:
        import torch
    except ImportError as e:
        raise MissingDependency("measuring a GPU needs torch; install with: pip install 'pnp-trt[build]'") from e
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in kinds:
        raise InputError(f"precision is '{precision}'; a GPU's peak is measured in {', '.join(kinds)}")
    if not torch.cuda.is_available():
        raise InputError("provider 'cuda' was requested, but torch finds no GPU; measure the device 'cpu'")
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means float32 here, as for every backend
    dtype = kinds[precision]

    def synchronised(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(10):  # several per synchronisation, to hide the launch overhead
                work()
            torch.cuda.synchronize()

        return run

    macs = 0.0
    for side in (4 * s for s in sides):
        a, b = (torch.rand(side, side, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty(side, side, device="cuda", dtype=dtype)
        call = synchronised(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
        macs = max(macs, 10 * side**3 / _best(call, seconds))
    source = torch.zeros(4 * bytes_, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 10 * 2 * source.numel() / _best(synchronised(lambda: target.copy_(source)), seconds)
    how = (
        f"best of repeated {dtype} runs by torch: products of square matrices of "
        f"{' and '.join(str(4 * s) for s in sides)} for the arithmetic, a copy of {4 * bytes_ / 2**20:.0f} MiB, "
        "read and written, for the bytes"
    )
    return Device(torch.cuda.get_device_name(0), macs, bandwidth, how, precision)

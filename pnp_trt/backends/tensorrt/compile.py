"""Compiles one network in a separate process: ``python -m pnp_trt.backends.tensorrt.compile``.

A failed build can break the next one in the same process, and a compiler that runs out of memory is killed together
with its process.  The caller therefore starts this module, writes one JSON object to its standard input, which it keeps
open, and reads JSON lines from its standard output: ``{"progress": …}`` during the work, and finally ``{"done": …}`` or
``{"error": …}``.  If the caller dies, its end of the pipe closes and this process exits.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ...bundle import memory
from ...bundle.compile_options import CompileOptions
from ...bundle.store import write_bytes
from ...errors import PnpError
from ..base import Profile
from .flavour import FLAVOURS, Flavour
from .layer_report import report as report_layers
from .logger import message_logger

#: seconds between progress reports
EVERY = 0.2


def main() -> int:
    """Compile the network described on standard input."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_caller, daemon=True).start()
    # redirect what the compiler's libraries print: standard output is for the caller only
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        work = compile_network
        if job.get("refit"):
            from .refit import refit_network as work
        send(done=work(job, lambda phase, share: send(progress=[phase, share])))
    except PnpError as e:
        send(error=str(e))
        return 1
    except OSError as e:
        send(error=f"{job['engine']} could not be written ({e.strerror or e}); nothing was written; free some space")
        return 1
    return 0


def _die_with_caller() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def compile_network(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Compile a graph and write the engine.

    Args:
        job: ``flavour``, ``graph``, ``engine``, ``inputs``, ``profiles``, ``target``, ``options``, ``timing_cache``,
            ``tensor_float32``, and ``refit``, an engine in which only the weights are replaced (see ``refit``).
        report: called with (phase, share done).

    Raises:
        PnpError: if it fails; the message has the compiler's.
    """
    started = time.monotonic()
    flavour = FLAVOURS[job["flavour"]]
    trt = flavour.load()
    options = CompileOptions(**job["options"])
    logger = message_logger(trt)
    builder = trt.Builder(logger)
    if hasattr(os, "sched_getaffinity"):
        builder.max_threads = len(os.sched_getaffinity(0))
    # always on in TensorRT 11, which still accepts the flag
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, job["graph"])
    decomposable = _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    _configure(trt, flavour, builder, config, network, job, options)
    cache = _timing_cache(flavour, config, job["timing_cache"])
    config.progress_monitor = _monitor(trt, report)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PnpError(logger.summary(f"{flavour.name} could not compile {Path(job['graph']).name}"))
    with Path(job["engine"]).open("wb") as f:
        f.write(plan)
    if cache is not None:
        write_bytes(bytes(config.get_timing_cache().serialize()), Path(job["timing_cache"]))
    return {
        "seconds": time.monotonic() - started,
        "peak_memory": memory.peak(),
        "layers": network.num_layers,
        "decomposable_attention": decomposable,
        "host_code": options.version_compatible,
        "tensor_float32": job["tensor_float32"],
        "warnings": logger.warnings,
        "reports": report_layers(logger.layers, [p["name"] for p in job["profiles"]]),
    }


def _parse(trt: Any, network: Any, logger: Any, graph: str) -> None:
    parser = trt.OnnxParser(network, logger)
    # a file that is not a graph is parsed without an error into an empty network
    if not parser.parse_from_file(graph) or not network.num_outputs:
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise PnpError(
            f"{Path(graph).name} cannot be parsed by {trt.__name__} {trt.__version__}: "
            f"{'; '.join(errors) or 'no reason given'}; a newer version may support its operators of opset 23"
        )


def _allow_decomposition(trt: Any, network: Any) -> int:
    """Allow decomposing attentions into several kernels if no fused kernel exists; otherwise the build would fail.

    There is no fused kernel in float32, and none in half precision for heads of more than 256, such as the head of 512
    in the autoencoders of Stable Diffusion (TensorRT developer guide; NVIDIA/TensorRT#4705).  An existing fused kernel
    is still used.

    Returns:
        The number of attentions.
    """
    count = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # downcast the plain ILayer that the bindings return
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(
    trt: Any, flavour: Flavour, builder: Any, config: Any, network: Any, job: dict[str, Any], options: CompileOptions
) -> None:
    if job["tensor_float32"]:
        config.set_flag(trt.BuilderFlag.TF32)
    else:  # float32 is used where half precision is not enough, and TF32 has the same ten bits of mantissa
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    flavour.set_target(trt, config, job["target"], options)
    flavour.allow_capture(trt, config)
    flavour.log_layers(trt, config)
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    if names != set(job["inputs"]):
        raise PnpError(f"the graph's inputs are {sorted(names)}, not {sorted(job['inputs'])}; please report it")
    for p in map(Profile.from_dict, job["profiles"]):
        profile = builder.create_optimization_profile()
        for name, (_, shape) in job["inputs"].items():
            extents = [p.extent(d) if isinstance(d, str) else (d, d, d) for d in shape]
            profile.set_shape(name, *map(list, zip(*extents, strict=True)))  # smallest, optimal, largest
        if config.add_optimization_profile(profile) < 0:
            raise PnpError(f"{flavour.name} did not accept profile {p.name}; choose others with --profile")


def _timing_cache(flavour: Flavour, config: Any, file: str | None) -> Any:
    if file is None or not flavour.has_timing_cache:
        return None
    data = Path(file).read_bytes() if Path(file).is_file() else b""
    cache = config.create_timing_cache(data)
    if not config.set_timing_cache(cache, False):  # written for another GPU: start with an empty one
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(trt: Any, report: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Combines the compiler's nested phases into one share of the whole."""

        def __init__(self) -> None:
            super().__init__()
            self.stack: list[list[Any]] = []  # [phase, steps, done]
            self.last = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.stack.append([phase, max(steps, 1), 0])
            self.report(parent is None)

        def step_complete(self, phase: str, step: int) -> bool:
            for entry in self.stack:
                if entry[0] == phase:
                    entry[2] = step + 1
            self.report()
            return True

        def phase_finish(self, phase: str) -> None:
            self.stack = [entry for entry in self.stack if entry[0] != phase]

        def report(self, now: bool = False) -> None:
            if not now and time.monotonic() - self.last < EVERY:
                return
            self.last = time.monotonic()
            share, weight = 0.0, 1.0
            for _, steps, done in self.stack:
                share += weight * min(done / steps, 1.0)
                weight /= steps
            report(self.stack[-1][0] if self.stack else "", min(share, 1.0))

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())

"""New weights in a refittable engine: runs in ``compile``'s process, on the GPU that the engine is for.

Sources: ``Refitter``, ``OnnxParserRefitter`` and ``ISerializationConfig`` in the Python API of TensorRT 10.15 to 11.4
and of TensorRT-RTX 1.7 (docs.nvidia.com/deeplearning/tensorrt, "Refitting an Engine").  The parser names weights as the
ONNX file does, so the file itself is the map.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...bundle import memory
from ...errors import PnpError
from .flavour import FLAVOURS
from .logger import message_logger


def refit_network(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Load the engine ``job["refit"]``, give it the weights of ``job["graph"]``, write ``job["engine"]``.

    Args:
        job: as of ``compile.compile_network``.
        report: called with (phase, share done).

    Raises:
        PnpError: with what TensorRT said, or the weights that it misses; nothing is written.
    """
    started = time.monotonic()
    flavour = FLAVOURS[job["flavour"]]
    trt = flavour.load()
    logger = message_logger(trt)
    runtime = trt.Runtime(logger)
    host_code = bool(job["options"]["version_compatible"])
    if host_code:  # a version-compatible plan carries a lean runtime of its own
        runtime.engine_host_code_allowed = True
    report("load the engine", 0.0)
    engine = runtime.deserialize_cuda_engine(Path(job["refit"]).read_bytes())
    name = Path(job["refit"]).name
    if engine is None:
        raise PnpError(logger.summary(f"{flavour.name} cannot load {name} to refit it"))
    if not engine.refittable:
        raise PnpError(f"{name} is not refittable, although its manifest states it; build it again with --refittable")
    report("refit", 0.3)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(job["graph"]):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        what = f"{flavour.name} could not refit {name} from {Path(job['graph']).name}"
        raise PnpError(f"{what}: {'; '.join(said)}" if said else logger.summary(what))
    if missing := refitter.get_missing_weights():
        raise PnpError(f"refitting {name} would leave {len(missing)} weights stale, for example {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise PnpError(logger.summary(f"{flavour.name} could not refit {name}"))
    report("write", 0.8)
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # since 10.14; so that it can be refit again
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    plan = engine.serialize_with_config(config)
    if plan is None:
        raise PnpError(logger.summary(f"{flavour.name} could not write the refitted {name}"))
    with Path(job["engine"]).open("wb") as f:
        f.write(plan)
    return {
        "seconds": time.monotonic() - started,
        "peak_memory": memory.peak(),
        "refitted": len(refitter.get_all_weights()),
        "host_code": host_code,
        "tensor_float32": job["tensor_float32"],
        "warnings": logger.warnings,
    }

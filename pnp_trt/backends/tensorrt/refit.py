"""Refitting of an engine with new weights, in the process of ``compile`` and on the GPU that the engine is for.

Sources: ``Refitter``, ``OnnxParserRefitter`` and ``ISerializationConfig`` in the Python API of TensorRT 10.15 to 11.4
and of TensorRT-RTX 1.7 (docs.nvidia.com/deeplearning/tensorrt, "Refitting an Engine").  The parser names weights as the
ONNX file does, so no separate map is needed.
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
    """Refit the engine ``job["refit"]`` with the weights of ``job["graph"]``, and write it to ``job["engine"]``.

    Args:
        job: same as in ``compile.compile_network``.
        report: called with (phase, share done).

    Raises:
        PnpError: with TensorRT's message, or the weights that are missing; nothing is written.
    """
    started = time.monotonic()
    flavour = FLAVOURS[job["flavour"]]
    trt = flavour.load()
    logger = message_logger(trt)
    runtime = trt.Runtime(logger)
    host_code = bool(job["options"]["version_compatible"])
    if host_code:  # a version-compatible plan contains its own lean runtime
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
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        what = f"{flavour.name} could not refit {name} from {Path(job['graph']).name}"
        raise PnpError(f"{what}: {'; '.join(errors)}" if errors else logger.summary(what))
    if missing := refitter.get_missing_weights():
        raise PnpError(f"refitting {name} would leave {len(missing)} weights stale, for example {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise PnpError(logger.summary(f"{flavour.name} could not refit {name}"))
    report("write", 0.8)
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # since 10.14; keeps the engine refittable
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

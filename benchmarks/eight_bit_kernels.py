"""FP8 and INT8 against FP16: kernels and bytes of the guided U-Net, from TensorRT-RTX's layer log.

The engines are compiled for ``--target`` on any machine, with random weights; no GPU is needed.  Activation ranges
are recorded from one image of three steps on the CPU (``pnp-trt calibrate``, minutes at SD 1.5's size), as for a build;
the kernels do not depend on them.  Parity is not measured, because random weights do not test a precision.

    python -m benchmarks.eight_bit_kernels                      # random:sd15; 10 GiB of memory
    python -m benchmarks.eight_bit_kernels --record FILE        # an earlier calibration of the same base and guide
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from pnp_trt import backends
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.models.networks import quiet_libraries
from pnp_trt.models.student import Student
from pnp_trt.precision.int8.record import Record
from pnp_trt.precision.recipes import FP16, recipe

from .guide_kernels import RESULTS, guide_of, report, unet_of
from .realsize import calibrate

SCHEMA = "pnp-trt/eight-bit-kernels/1"


def main(arguments: list[str] | None = None) -> None:
    """Compile all three, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:sd15", help="a random:… base")
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--record", type=Path, help="a calibration record; default: record one")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/eight-bit-kernels-BASE.json")
    a = parser.parse_args(arguments)
    quiet_libraries()
    backend = backends.get("tensorrt-rtx")
    recipes = (FP16, *(recipe(name).on_backend(FP16, backend.int8_one_scale) for name in ("fp8", "int8")))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pnp-trt-8bit-") as work:
        path = a.record or Path(work) / "record.json"
        if a.record is None:
            calibrate(a.base, "tiny", path)
        record = Record.read(path)
        for used in recipes:
            unet = unet_of(a.base)
            module = Student(unet, guide_of(unet)).eval()
            folder = Path(work) / used.name
            folder.mkdir()
            rows[used.name] = report(module, True, a.target, folder, used, record)
            if used.needs_record:
                chosen = used.choices(record)
                rows[used.name] |= {"layers": len(chosen), "share_of_macs": round(record.share(chosen), 4)}
            print(used.name, rows[used.name])
    counts = ("kernels", "activation_bytes", "weight_bytes")
    ratios = {
        name: {count: round(rows[name][count] / rows[FP16.name][count], 4) for count in counts}
        for name in ("fp8", "int8")
    }
    print("over fp16:", ratios)
    words = ["python", "-m", "benchmarks.eight_bit_kernels", *(sys.argv[1:] if arguments is None else arguments)]
    out = a.json or RESULTS / f"eight-bit-kernels-{a.base.removeprefix('random:')}.json"
    document = {"schema": SCHEMA, "provenance": provenance(words), "base": a.base, "target": a.target}
    write_json(out, document | {"engines": rows, "over_fp16": ratios})
    print(out)


if __name__ == "__main__":
    main()

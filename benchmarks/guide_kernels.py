"""Cost of a guide in an engine: kernels and bytes of the guided and unguided U-Net, from TensorRT-RTX's layer log.

The engines are compiled for ``--target`` on any machine, in float16 with random weights, which do not affect the
kernels; no GPU is needed.  The default is a small U-Net like Stable Diffusion's (320 and 640 channels, 64 x 64
latents), which takes a minute; ``--base random:sd15`` takes about ten minutes and 8 GiB of memory.

    python -m benchmarks.guide_kernels
    python -m benchmarks.guide_kernels --base random:sd15
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pnp_trt import backends
from pnp_trt.backends.base import CompileJob, Profile
from pnp_trt.build.onnx_export import export
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.models.guides import TinyGuide
from pnp_trt.models.networks import quiet_libraries
from pnp_trt.models.student import Student, Teacher
from pnp_trt.models.teacher import random_unet_config
from pnp_trt.precision.int8.record import Record
from pnp_trt.precision.recipes import FP16, Recipe

SCHEMA = "pnp-trt/guide-kernels/1"
RESULTS = Path(__file__).parent / "results"
#: config of the small U-Net where it differs from Stable Diffusion 1.5's
SMALL: dict[str, Any] = {
    "block_out_channels": (320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def unet_of(base: str) -> Any:
    """A U-Net with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = random_unet_config("random:sd15" if base == "small" else base)
    return UNet2DConditionModel.from_config(config | (SMALL if base == "small" else {})).eval()


def guide_of(unet: Any) -> TinyGuide:
    """A tiny guide with small random weights in place of its initial zeros, which a compiler could remove."""
    guide = TinyGuide.from_unet(unet).eval()
    with torch.no_grad():
        for layer in (guide.film, *(adapter.expand for adapter in guide.adapters)):
            layer.weight.normal_(std=0.01)
    return guide


def report(
    module: torch.nn.Module, guided: bool, target: str, folder: Path, used: Recipe = FP16, record: Record | None = None
) -> dict[str, Any]:
    """The layer report at batch 1 in a recipe; quantised recipes need ``record``."""
    config = module.unet.config  # type: ignore[union-attr]
    side, width = config.sample_size, config.cross_attention_dim
    inputs = {
        "sample": torch.zeros(2, config.in_channels, side, side),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.zeros(2, 77, width),
    } | ({"guidance": torch.full((2,), 3.0)} if guided else {})
    path = folder / "unet.onnx"
    weights = export(used.convert(module), inputs, "prediction", path)
    used.quantize(path, weights, record)
    described = {k: (str(v.dtype).removeprefix("torch."), ("batch", *v.shape[1:])) for k, v in inputs.items()}
    job = CompileJob("unet", path, described, used.name, target, (Profile("b1", 1, 1, 1),))
    compiled = backends.get("tensorrt-rtx").compile(job, lambda *_: None)
    (row,) = compiled.notes["reports"]
    return dict(row)


def main(arguments: list[str] | None = None) -> None:
    """Compile both, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="small", help="small, or a random:… base")
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/guide-kernels-BASE.json")
    a = parser.parse_args(arguments)
    quiet_libraries()
    rows = {}
    for name in ("unguided", "guided"):
        unet = unet_of(a.base)
        module = Teacher(unet) if name == "unguided" else Student(unet, guide_of(unet))
        with tempfile.TemporaryDirectory(prefix="pnp-trt-kernels-") as folder:
            rows[name] = report(module.eval(), name == "guided", a.target, Path(folder))
        print(name, rows[name])
    guided, unguided = rows["guided"], rows["unguided"]
    ratios = {k: round(guided[k] / unguided[k], 4) for k in ("kernels", "activation_bytes", "weight_bytes")}
    print("guided / unguided:", ratios)
    words = ["python", "-m", "benchmarks.guide_kernels", *(sys.argv[1:] if arguments is None else arguments)]
    document = {"schema": SCHEMA, "provenance": provenance(words), "base": a.base, "target": a.target}
    out = a.json or RESULTS / f"guide-kernels-{a.base.removeprefix('random:')}.json"
    write_json(out, document | {"engines": rows, "guided_over_unguided": ratios})
    print(out)


if __name__ == "__main__":
    main()

"""Check whether a base and a guide stay in float16's range, by their largest values computed in float32.

``python -m benchmarks.float16_range --base random:sdxl`` evaluates the U-Net alone, and with the guide at each w, on
one prompt's text states and 32 × 32 latents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.distill.run import TeacherModel
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student

SCHEMA = "pnp-trt/float16-range/1"
RESULTS = Path(__file__).parent / "results"
PROMPT, SCALES, SIDE, TIMESTEP = "a red apple", (2.0, 7.5), 32, 801


@torch.no_grad()
def largest(model: nn.Module, part: nn.Module, inputs: dict[str, Any]) -> float:
    """Largest output magnitude of the layers of ``part`` during one evaluation of ``model``."""
    magnitudes = [0.0]

    def record_magnitude(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            magnitudes.append(float(output.abs().max()))

    hooks = [m.register_forward_hook(record_magnitude) for m in part.modules() if not list(m.children())]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return max(magnitudes)


def measure(base: str, guide: str, scales: Iterable[float] = SCALES) -> dict[str, Any]:
    """Largest values of the U-Net's layers without a guide, and of the guide's at each w."""
    torch.manual_seed(0)
    teacher = TeacherModel.load(base, [PROMPT], torch.device("cpu"))
    row, device = torch.tensor([0]), teacher.device
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, teacher.unet.config.in_channels, SIDE, SIDE), "timestep": torch.tensor([TIMESTEP]),
        "encoder_hidden_states": teacher.conditions.text(row, device),
        "added_cond_kwargs": teacher.conditions.added(row, device),
    }  # fmt: skip
    guide_network = (teacher.base.make_guide(guide, teacher.unet) or load_guide(guide)).float().eval()
    student = Student(teacher.unet, guide_network)
    return {
        "unet": largest(teacher.unet, teacher.unet, inputs),
        "guide": {f"{w:g}": largest(student, guide_network, inputs | {"guidance": torch.tensor([w])}) for w in scales},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:sdxl")
    parser.add_argument("--guide", default="tiny")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/float16-range-BASE.json")
    a = parser.parse_args(arguments)
    values = measure(a.base, a.guide)
    limit = torch.finfo(torch.float16).max
    of_guide = ", ".join(f"{v:,.0f} at w = {w}" for w, v in values["guide"].items())
    print(f"float16 ends at {limit:,.0f}; the U-Net's largest value is {values['unet']:,.0f}, the guide's {of_guide}")
    words = ["python", "-m", "benchmarks.float16_range", *(sys.argv[1:] if arguments is None else arguments)]
    document = {
        "schema": SCHEMA, "provenance": provenance(words), "base": a.base, "guide": a.guide, "prompt": PROMPT,
        "side": SIDE, "timestep": TIMESTEP, "largest": values, "float16_largest": limit,
    }  # fmt: skip
    write_json(a.json or RESULTS / f"float16-range-{a.base.removeprefix('random:').replace('/', '-')}.json", document)


if __name__ == "__main__":
    main()

"""Whether a base and a guide stay in float16's range on a prompt: the largest value of each, computed in float32.

``python -m benchmarks.float16_range --base random:sdxl`` evaluates the U-Net alone, and with the guide at each w, on
the prompt's text states and latents of 32 × 32.
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
    """Largest magnitude that a layer of ``part`` returns while ``model`` is evaluated."""
    found = [0.0]

    def seen(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(float(output.abs().max()))

    hooks = [m.register_forward_hook(seen) for m in part.modules() if not list(m.children())]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)


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
    made = (teacher.base.make_guide(guide, teacher.unet) or load_guide(guide)).float().eval()
    student = Student(teacher.unet, made)
    return {
        "unet": largest(teacher.unet, teacher.unet, inputs),
        "guide": {f"{w:g}": largest(student, made, inputs | {"guidance": torch.tensor([w])}) for w in scales},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random:sdxl")
    parser.add_argument("--guide", default="tiny")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/float16-range-BASE.json")
    a = parser.parse_args(arguments)
    found = measure(a.base, a.guide)
    limit = torch.finfo(torch.float16).max
    of_guide = ", ".join(f"{v:,.0f} at w = {w}" for w, v in found["guide"].items())
    print(f"float16 ends at {limit:,.0f}; the U-Net's largest is {found['unet']:,.0f}, the guide's {of_guide}")
    words = ["python", "-m", "benchmarks.float16_range", *(sys.argv[1:] if arguments is None else arguments)]
    document = {
        "schema": SCHEMA, "provenance": provenance(words), "base": a.base, "guide": a.guide, "prompt": PROMPT,
        "side": SIDE, "timestep": TIMESTEP, "largest": found, "float16_largest": limit,
    }  # fmt: skip
    write_json(a.json or RESULTS / f"float16-range-{a.base.removeprefix('random:').replace('/', '-')}.json", document)


if __name__ == "__main__":
    main()

"""Use a guide in diffusers' own pipeline: CFG then takes one evaluation of the U-Net per step instead of two.

python examples/diffusers_pipeline.py BASE_FOLDER GUIDE_FOLDER image.png
"""

from __future__ import annotations

import sys

import torch
from diffusers import StableDiffusionPipeline

from pnp_trt.integrations.diffusers import apply_guide, remove_guide


def main(base: str, guide: str, file: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, torch_dtype=torch.float32)
    evaluated: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda _module, inputs, _output: evaluated.append(len(inputs[0])))
    for guided in (False, True):
        if guided:
            apply_guide(pipe, guide)
        evaluated.clear()
        noise = torch.Generator().manual_seed(0)
        image = pipe("a red apple", num_inference_steps=8, guidance_scale=3.0, generator=noise).images[0]
        print("guided:" if guided else "CFG:", sum(evaluated), "evaluations of the U-Net")
    image.save(file)
    remove_guide(pipe)  # restores the original pipeline


if __name__ == "__main__":
    main(*sys.argv[1:4])

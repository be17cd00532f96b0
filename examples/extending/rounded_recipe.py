"""A precision recipe to measure the error of bfloat16 storage: weights rounded to bfloat16, arithmetic in float32."""

from dataclasses import dataclass

from torch import nn

from pnp_trt.precision.recipes import Recipe


@dataclass(frozen=True)
class Bf16Rounded(Recipe):
    """A recipe whose limit is ten times bfloat16's rounding error of 2⁻⁹."""

    name: str = "bf16-rounded"
    dtype: str = "float32"
    limit: float = 2e-2

    def convert(self, module: nn.Module) -> nn.Module:
        for weight in module.parameters():
            weight.data = weight.data.bfloat16().float()
        return module


BF16_ROUNDED = Bf16Rounded()

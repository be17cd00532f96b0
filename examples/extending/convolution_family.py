"""A family of base models: a convolutional denoiser instead of Stable Diffusion's U-Net.

A model is a diffusers folder with ``ConvolutionPipeline`` in ``model_index.json``. Its text encoder, VAE and scheduler
are Stable Diffusion's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pnp_trt.models.families import Family
from pnp_trt.models.networks import load_network
from pnp_trt.models.teacher import BaseModel


class ConvolutionDenoiser(ModelMixin, ConfigMixin):
    """Two convolutions, with a shift from the timestep and the prompt's mean text state between them."""

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        cross_attention_dim: int,
        block_out_channels: tuple[int, ...] = (16,),
    ) -> None:
        super().__init__()
        width = block_out_channels[0]
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.text = nn.Linear(cross_attention_dim, width)
        self.time = nn.Linear(1, width)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = self.time(timestep.to(sample.dtype)[:, None] / 1000)
        shift = self.text(encoder_hidden_states.mean(1)) + time
        return self.last(torch.tanh(self.first(sample) + shift[:, :, None, None]))


class ConvolutionBase(BaseModel):
    """A model in one folder; ``check`` loads the network that ``unet`` returns."""

    def unet(self) -> Any:
        return load_network(ConvolutionDenoiser, self.folder / "unet").eval().requires_grad_(False)

    def denoiser(self) -> nn.Module:
        return self.unet()


class Convolution(Family):
    """The family, recognised by the pipeline's name."""

    name = "convolution"

    def reads(self, folder: Path) -> bool:
        index = folder / "model_index.json"
        return index.is_file() and json.loads(index.read_text()).get("_class_name") == "ConvolutionPipeline"

    def open(self, name: str, folder: Path) -> BaseModel:
        return ConvolutionBase(name, folder)


CONVOLUTION = Convolution()

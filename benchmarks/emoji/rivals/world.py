"""Frozen parts that training and measuring share: U-Nets, autoencoder, text states and states to distil on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnp_trt.errors import InputError

from ..cells import FINE_TUNES, TEACHER
from ..gpu_train import Data, GuideStates, NegativeStates, text_states

BASES = (TEACHER, *FINE_TUNES)
#: U-Net → its set in the packed data
SETS = {TEACHER: "base", **{name: name.removeprefix("emoji-") for name in FINE_TUNES}}


def unet_file(assets: Path, base: str) -> Path:
    """The weights of the bundled U-Net or of a fine-tune."""
    if base == TEACHER:
        return assets / "emoji/unet/diffusion_pytorch_model.safetensors"
    return assets / f"fine-tunes/{base}.safetensors"


class World:
    """The bundled model and its data on one device, frozen, in float32.

    Args:
        assets: folder with ``emoji/`` and ``fine-tunes/``, as in the package.
        data: the file that ``python -m benchmarks.emoji.gpu_train pack`` writes.

    Raises:
        InputError: if ``data`` does not exist.
    """

    def __init__(self, assets: Path, data: Path, device: torch.device) -> None:
        from diffusers import AutoencoderTiny
        from transformers import CLIPTextModel

        if not data.is_file():
            raise InputError(f"{data} does not exist; run: python -m benchmarks.emoji.gpu_train pack")
        self.assets, self.device = assets, device
        with np.load(data) as file:
            # all at once: forked processes would share the position in an open file
            self.held = dict(file)
        self.vae = AutoencoderTiny.from_pretrained(assets / "emoji/vae").float().to(device).requires_grad_(False)
        self.encoder = CLIPTextModel.from_pretrained(assets / "emoji/text_encoder").float().to(device)
        self.encoder.requires_grad_(False).eval()
        self.empty = self._states(self.held["empty"])
        self._unets: dict[str, Any] = {}
        self._drawn: dict[str, tuple[Data, Tensor, Tensor]] = {}

    @torch.no_grad()
    def _states(self, ids: np.ndarray) -> Tensor:
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        return torch.cat([text_states(self.encoder, tokens[i : i + 256]) for i in range(0, len(tokens), 256)])

    def unet(self, base: str) -> Any:
        """The U-Net of this name, frozen."""
        from diffusers import UNet2DConditionModel
        from safetensors.torch import load_file

        if base not in self._unets:
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(self.assets / "emoji/unet"))
            unet.load_state_dict(load_file(unet_file(self.assets, base)))
            unet = unet.float().requires_grad_(False).eval()
            self._unets[base] = unet.to(self.device).to(memory_format=torch.channels_last)
        return self._unets[base]

    def states(self, base: str, batch: int, own: float = 0.5) -> GuideStates:
        """Fresh states of a base's images and prompts; a fine-tune's prompts are its images' captions.

        Args:
            batch: batch size.
            own: share of the trajectories that follow the student.
        """
        return GuideStates(*self._sources(base), batch, own)

    def negative_states(self, base: str, batch: int, own: float = 0.5) -> NegativeStates:
        """Fresh states as in :meth:`states`, with a negative prompt each."""
        return NegativeStates(*self._sources(base), batch, own)

    def _sources(self, base: str) -> tuple[Data, Tensor, Tensor]:
        """Images, text states of the trajectories' prompts, and text states of the images' captions."""
        if base not in self._drawn:
            data = Data(self.held, SETS[base], self.vae, self.device)
            captions = self._states(self.held[f"{SETS[base]}.ids"][:, 0])
            self._drawn[base] = data, self._states(self.held["prompts"]) if base == TEACHER else captions, captions
        return self._drawn[base]


def choose_device() -> torch.device:
    """The GPU, with TF32 products as in the training of the guides, or the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def beside_of(rival: Any, unet: Any, empty: Tensor) -> Callable[..., Tensor]:
    """(x, t, text, w[, encoded]) → prediction of a rival with ``unet``; ``empty [1, tokens, D]``."""

    def predict(x: Tensor, t: Tensor, text: Tensor, w: Tensor, encoded: Any = None) -> Tensor:
        return rival(unet, x, t, text, empty.expand_as(text), w, encoded)

    return predict

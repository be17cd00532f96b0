"""A family of base models: how its folders are recognised, and the class that opens them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from ..specs import Layout
from ..teacher import BaseModel


class Family(ABC):
    """Base models whose folders have the same parts and networks.

    What a bundle is built of is the opened model's: ``BaseModel.networks`` names the modules that are exported,
    ``text_specs`` its text encoders, ``golden_inputs`` what parity is measured on, ``golden_added`` the U-Net's inputs
    besides latents, timestep and text states, ``sizes`` the tensors, ``scheduler_config`` the noise, ``check_configs``
    and ``check`` what is refused, ``fingerprint`` and ``configs_sha256`` the identity.  A family overrides those that
    differ from Stable Diffusion's.

    Attributes:
        name: as ``FAMILIES`` has it.
        model: class of its models.
        layouts: of its text encoders in checkpoints of one file.
        leftovers: (pattern, what it is) of keys that training leaves beside them and no inference uses.
    """

    name: str
    model: type[BaseModel] = BaseModel
    layouts: tuple[Layout, ...] = ()
    leftovers: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def reads(self, folder: Path) -> bool:
        """Whether a folder is a model of this family; from its small files, no weights are read."""

    @abstractmethod
    def open(self, name: str, folder: Path) -> BaseModel:
        """The model in a folder that :meth:`reads`.

        Args:
            name: as the user gave it.

        Raises:
            InputError: for a part or file that is missing.
        """

"""Base class of families of base models: recognising and opening their folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from ..specs import Layout
from ..teacher import BaseModel


class Family(ABC):
    """Base models whose folders have the same structure and networks.

    The members of ``BaseModel`` define how a bundle is built: ``networks`` the exported modules, ``text_specs`` the
    text encoders, ``golden_inputs`` the inputs for measuring parity, ``golden_added`` the U-Net's inputs besides
    latents, timestep and text states, ``sizes`` the tensors' sizes, ``scheduler_config`` the noise schedule,
    ``check_configs`` and ``check`` which models are refused, ``fingerprint`` and ``configs_sha256`` the identity.  A
    family's model class overrides those that differ from Stable Diffusion's.

    Attributes:
        name: name in ``FAMILIES``.
        model: class of its models.
        layouts: layouts of its text encoders in single-file checkpoints.
        leftovers: (pattern, kind) of keys in such checkpoints that training leaves and inference does not use.
    """

    name: str
    model: type[BaseModel] = BaseModel
    layouts: tuple[Layout, ...] = ()
    leftovers: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def reads(self, folder: Path) -> bool:
        """Whether a folder is a model of this family; does not read weights."""

    @abstractmethod
    def open(self, name: str, folder: Path) -> BaseModel:
        """Open the model in a folder for which :meth:`reads` is true.

        Args:
            name: name as entered by the user.

        Raises:
            InputError: if a part or file is missing.
        """

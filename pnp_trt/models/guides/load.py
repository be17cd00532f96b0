"""Loading of guides: bundled ones by name, and folders written by ``save_pretrained``."""

from __future__ import annotations

from ..catalog import guide_config, guide_folder, guide_weights
from ..networks import check_finite, load_network
from . import GUIDES, Guide, name_of_class


def load_guide(name: str) -> Guide:
    """Load a guide in float32, frozen, and check that its weights are finite.

    Raises:
        InputError: if there is no guide of this name, or its files are damaged.
    """
    guide_weights(guide_folder(name))
    guide = load_network(guide_class(name), guide_folder(name))
    return check_finite(guide, name).eval().requires_grad_(False)


def guide_class(name: str) -> type[Guide]:
    """Return the class of a guide without reading its weights.

    Raises:
        InputError: if there is no guide of this name, or its class is not registered.
    """
    folder = guide_folder(name)
    return GUIDES[name_of_class(guide_config(folder)["_class_name"], folder)]

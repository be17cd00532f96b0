"""LoRA files (Hu et al. 2021) merged into a network before it is plugged: W + scale · alpha/rank · B·A.

``source`` parses the ``--lora`` argument, ``names`` lists the names of a network's layers in each LoRA format, ``keys``
groups a file's keys by layer, ``adapter_config`` reads scales from peft's configuration, ``read`` loads and checks a
file, and ``merge`` does the arithmetic.
"""

from .merge import merge
from .names import LayerNames, architecture
from .read import LoraWeights, load
from .source import Lora, bundled_loras

__all__ = ["LayerNames", "Lora", "LoraWeights", "architecture", "bundled_loras", "load", "merge"]

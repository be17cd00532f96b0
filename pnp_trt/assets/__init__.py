"""Files shipped with the package: the bundled model, its fine-tunes, LoRAs and guides."""

from pathlib import Path

ROOT = Path(__file__).parent

"""Files shipped with the package: the bundled model, its fine-tunes and guides."""

from pathlib import Path

ROOT = Path(__file__).parent

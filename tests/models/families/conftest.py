"""SDXL's bundles, built once: all tests of the family share four exports."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ...conftest import make_micro_guide, once

#: image sizes of the bundles; the range includes the model's native size
SIZES = "b1@16-48x16-48"


@pytest.fixture(scope="session")
def sdxl_guide(micro_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny guide with non-zero residuals for the micro SDXL; do not write into it."""
    return once(tmp_path_factory, "sdxl/micro-guide", partial(make_micro_guide, micro_sdxl))


def make(base: Path, guide: Path | None, folder: Path) -> None:
    """Build a bundle for several sizes."""
    from pnp_trt.build.builder import build
    from pnp_trt.build.spec import BuildSpec

    build(BuildSpec(str(base), "none" if guide is None else str(guide), out=folder, profiles=(SIZES,)))


@pytest.fixture(scope="session")
def sdxl_plain(micro_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro SDXL's bundle without a guide; do not write into it."""
    return once(tmp_path_factory, "sdxl/engines/plain", partial(make, micro_sdxl, None))


@pytest.fixture(scope="session")
def sdxl_guided(micro_sdxl: Path, sdxl_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro SDXL's bundle with a guide; do not write into it."""
    return once(tmp_path_factory, "sdxl/engines/guided", partial(make, micro_sdxl, sdxl_guide))

"""Install the example package beside pnp-trt: its modules on the path, and metadata with its entry points."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pnp_trt.backends import BACKENDS
from pnp_trt.bench.metric import METRICS
from pnp_trt.models.families import FAMILIES
from pnp_trt.models.guides import GUIDES
from pnp_trt.precision.recipes import RECIPES
from pnp_trt.sampling.schedules import SCHEDULES

from ..conftest import Result, shared_root
from ..forking import Forking

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "extending"


def entry_points() -> dict[str, dict[str, str]]:
    """The entry points of ``examples/extending/pyproject.toml``: group → name → value."""
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups: dict[str, dict[str, str]] = project["entry-points"]
    return groups


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ``PYTHONPATH`` with the example package installed."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "pnp_trt_extending-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pnp-trt-extending\nVersion: 0.1.0\n")
    lines = []
    for group, points in entry_points().items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(site), str(EXAMPLES), str(ROOT)])


@pytest.fixture(scope="session")
def pnp_trt(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Result]]:
    """Run ``pnp-trt ARGS`` in a separate process in which the example package is installed."""
    forking = Forking(shared_root(tmp_path_factory), {"PYTHONPATH": installed})
    yield lambda *arguments: Result(*forking.run(*arguments))
    forking.stop()


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the examples importable for oracles in this process; afterwards remove their values from the registries."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for registry in (SCHEDULES, GUIDES, RECIPES, METRICS, BACKENDS, FAMILIES):
        for name, value in entry_points().get(f"pnp_trt.{registry.kind}", {}).items():
            registry.unregister(name)
            sys.modules.pop(value.partition(":")[0], None)

"""The campaign under pytest: a fixed fifth of it, or all of it with PNP_TRT_CAMPAIGN=full (``make campaign``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from ..conftest import finished, shared_root
from . import areas, report
from .case import Case
from .fixtures import gather
from .zygote import Zygote

FULL = os.environ.get("PNP_TRT_CAMPAIGN") == "full"
#: Most cases of one test; larger areas are split into several tests, which xdist distributes.
CHUNK = 40


def _chunks() -> Iterator[object]:
    for area, cases in areas.load().items():
        chosen = cases if FULL else areas.quick(cases)
        for n in range(0, len(chosen), CHUNK):
            yield pytest.param(chosen[n : n + CHUNK], id=f"{area}-{n // CHUNK + 1}".replace(" ", "-"))


@pytest.fixture(scope="session")
def zygote(
    micro_base: Path, micro_guide: Path, micro_bundles: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Zygote]:
    """One zygote for all workers of this session; it ends with the session."""
    common = shared_root(tmp_path_factory)
    scratch = common / "campaign"
    with FileLock(common / "campaign.lock"):
        if not (scratch / "fixtures").exists():
            (scratch / "building").mkdir(parents=True)
            gather(scratch / "building", micro_base, micro_guide, micro_bundles)
            for trace in finished(common, "traces"):
                shutil.copytree(trace, scratch / "traces" / trace.name)
            (scratch / "building").rename(scratch / "fixtures")
        client = Zygote(scratch)
    yield client
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        client.stop()


@pytest.mark.parametrize("cases", list(_chunks()))
def test_area(cases: list[Case], zygote: Zygote, tmp_path: Path) -> None:
    rows = [zygote.run(case) for case in cases]
    report.add(rows, report.FOLDER)
    failed = [report.describe(row) for row in rows if row["class"] != "OK"]
    assert not failed, "\n".join([f"{len(failed)} of {len(rows)} cases did not hold:", *failed])


def test_the_sizes_of_the_full_and_the_quick_campaign() -> None:
    every = areas.load()
    number = sum(map(len, every.values()))
    assert number >= 1500
    for cases in every.values():
        names = [c.name for c in areas.quick(cases)]
        assert len(set(names)) == len(names)
    assert sum(len(areas.quick(cases)) for cases in every.values()) >= number // 6  # about a fifth

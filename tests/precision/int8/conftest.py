"""A calibration record of the micro student, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red apple\na green tree\na cat\n")
    return path


@pytest.fixture(scope="session")
def micro_record(micro_base: Path, micro_guide: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record that ``calibrate`` writes for the micro base and guide; do not write into it."""
    from pnp_trt.precision.int8.calibrate import CalibrationConfig, calibrate

    out = tmp_path_factory.mktemp("records") / "micro.int8.json"
    calibrate(
        CalibrationConfig(
            str(micro_base), str(micro_guide), prompts, out, images=3, batch=2, steps=4, probes=2, limit=0.01
        )
    )
    return out

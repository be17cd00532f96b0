"""OpenVINO on the CPU."""

from __future__ import annotations

from ..needs import Needs

NEEDS = Needs("fp32, on the CPU", extra="openvino")

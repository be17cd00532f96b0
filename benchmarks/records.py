"""Reading records of ``benchmarks/results``, also with earlier field names; and options that benchmarks share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pnp_trt.bench.renames import current_names


def read(path: Path) -> dict[str, Any]:
    """Read a record and rename the fields of earlier versions to their current names."""
    document: dict[str, Any] = current_names(json.loads(path.read_text(encoding="utf-8")))
    return document


def add_images_option(parser: argparse.ArgumentParser, default: int, help: str | None = None) -> None:
    """Add ``--images N``, and its hidden spelling in the commands of earlier records."""
    parser.add_argument("--images", type=int, default=default, help=help)
    parser.add_argument(
        "--pictures", dest="images", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # fmt: skip


def add_sampling_options(parser: argparse.ArgumentParser, images: str, batch: int) -> None:
    """Add the options of all commands that sample images of the bundled model and measure them.

    Args:
        images: help text of ``--images``.
        batch: default of ``--batch``.
    """
    add = parser.add_argument
    add("--judge", type=Path, default=Path("pnp_trt/assets/judge.safetensors"))
    add("--cache", type=Path, default=Path("build/emoji"), help="rendered images, samples, features, work in progress")
    add_images_option(parser, 512, images)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="their images differ in the last bits")
    add("--batch", type=int, default=batch, help="images per batch")


def machine_said(document: dict[str, Any]) -> str:
    """The GPU or processor that sampled the images."""
    device = document["provenance"]["device"]
    if "--device cuda" in (document["provenance"]["command"] or ""):
        return str(device["gpu"])
    return f"{device['processor']}, {device['threads']} thread{'s' * (device['threads'] != 1)}"

"""Code shared by both stages: the frozen teacher with its conditions, the guide's folder, and the head of a report."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..bundle.runs import read_record
from ..errors import InputError, PnpError
from ..io.files import make_temporary_folder, whole_file
from ..io.json_schema import problem
from ..models.bases import resolve
from ..models.conditioning import Conditions, encode_prompts
from ..models.prompts import read_prompts, warn_of_long_prompts
from ..models.scheduler import base_scheduler
from ..models.teacher import BaseModel
from ..version import __version__


@dataclass
class TeacherModel:
    """A frozen teacher on its device, with the conditions of the run's prompts.

    Attributes:
        unet: ``UNet2DConditionModel``.
        scheduler: its scheduler config.
        conditions: conditions of ``prompts``, with the empty prompt last.
        hashes: sha256 of the weights that the states depend on.
    """

    base: BaseModel
    unet: Any
    scheduler: dict[str, Any]
    prompts: list[str]
    conditions: Conditions
    hashes: dict[str, str]
    device: torch.device

    @classmethod
    def load(cls, name: str, prompts: list[str], device: torch.device) -> TeacherModel:
        """Load a base model and encode ``prompts``; prompts that are too long are truncated with a warning.

        Raises:
            InputError: if the model cannot be read, or its images are not square.
        """
        base = resolve(name)
        base.side()
        warn_of_long_prompts(base.tokenizer(), prompts)
        hashes = {k: v for k, v in base.fingerprint().items() if k in ("unet", "text_encoder", "text_encoder_2")}
        return cls(  # random bases are in float16
            base, base.unet().float().to(device), base.scheduler_config(), prompts,
            encode_prompts(base, prompts, device), hashes, device,
        )  # fmt: skip

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a latent."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size


def save_guide(guide: Any, folder: Path) -> None:
    """Write a guide in diffusers' format.  Each file is written atomically, with the usual file permissions.

    Raises:
        PnpError: if the disk is full; no partial file is left.
    """
    from safetensors import SafetensorError

    work = make_temporary_folder(folder / "guide")
    try:
        guide.save_pretrained(work, safe_serialization=True)
        for path in sorted(
            work.iterdir(), reverse=True
        ):  # weights before config.json, which marks the folder as a guide
            with whole_file(folder / path.name) as temporary:
                path.replace(temporary)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise PnpError(
            f"the guide could not be written to {folder} ({reason}); make room and continue with --resume"
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def guide_weights(folder: Path) -> Path:
    """The file with a guide's weights.

    Raises:
        InputError: if there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"the guide {folder} holds no .safetensors; name a folder made by pnp-trt distill guidance")
    return files[0]


def origin_record(folder: Path) -> dict[str, Any] | None:
    """The report of the run that made a guide; None if its folder has none.

    Raises:
        InputError: if the report is damaged or is not a distillation report.
    """
    report = folder / "distill.json"
    if not report.is_file():
        return None
    document = read_record(report, "pass --base and --prompts, and remove that file")
    shape = {"type": "object", "properties": {"settings": {"type": "object", "properties": {
        "base": {"type": "string"}, "prompts": {"type": ["string", "null"]}}}}}  # fmt: skip
    if error := problem(document, shape):
        raise InputError(f"{report} is not a report of pnp-trt distill: {error}; remove that file")
    return document


def origin(folder: Path, base: str | None, prompts: Path | None) -> tuple[str, list[str], Path]:
    """Base, prompts and the prompts' file; None takes those in the guide's report.

    Raises:
        InputError: if they are neither passed nor in the report, or cannot be read.
    """
    known = (origin_record(folder) or {}).get("settings", {})
    name = base or known.get("base")
    file = prompts or (Path(known["prompts"]) if known.get("prompts") else None)
    if name is None:
        raise InputError(f"{folder} does not state which base it was distilled for; pass --base")
    if file is None or (prompts is None and not file.is_file()):
        raise InputError(f"the prompts that {folder} was distilled with are not available; pass --prompts FILE")
    return name, read_prompts(file), file


def report_head(teacher: TeacherModel, guide: Any, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The part of a report that all stages share: settings, teacher, sizes, time, device and versions."""
    return {
        "settings": json.loads(json.dumps(settings, default=str)),
        "teacher": teacher.hashes,
        # build compares it with the scheduler of the base that the guide is fused into
        "scheduler": base_scheduler(teacher.base),
        "parameters": {
            "guide": sum(p.numel() for p in guide.parameters()),
            "unet": sum(p.numel() for p in teacher.unet.parameters()),
        },
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if teacher.device.type == "cuda" else "cpu",
        "versions": {p: version(p) for p in ("torch", "diffusers", "accelerate")} | {"pnp-trt": __version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

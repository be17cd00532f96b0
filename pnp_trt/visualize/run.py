"""``pnp-trt visualize``: record guided runs, draw the figures and write the numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bundle.provenance import as_text, provenance
from ..bundle.store import digest, sha256
from ..errors import InputError
from ..io.files import check_writable_folder, make_folder
from ..io.inputs import excerpt, shortened, warn_of_syntax
from ..io.process import deferred
from ..models.bases import resolve
from ..models.catalog import guide_folder
from ..models.guides.load import load_guide
from ..models.prompts import warn_of_long_prompts
from ..models.student import Student
from ..runtime.images import encode_image, write_all_new
from ..runtime.pipeline import check_request
from ..sampling.schedules import ddim
from .maps import draw_maps, shown_steps
from .record import Progress, Recording, layer_names, record, white_noise_share
from .strength import draw_strength
from .summary import describe, summarise

SCHEMA = "pnp-trt/visualize/1"
#: limits of one figure
MOST_SCALES, MOST_STEPS = 16, 32
_FILES = (("feature-maps", ".png"), ("strength", ".png"), ("strength", ".json"))


@dataclass(frozen=True)
class VisualizeRequest:
    """A visualisation request.

    Attributes:
        guide: a guide's name or folder.
        prompts: the prompts; the maps show the first, the strengths are means over all.
        guidance: scales w, 1 … 9.
        steps: sampling steps.
        base: the teacher, or a fine-tune of it.
        seed: seed of the initial noise, which all runs share.
        show: number of steps in the figure of feature maps.
        layers: names (``skip-0`` …, ``mid``) or indices of the layers in that figure, or ``all``; if empty, the
            shallowest and the deepest skip that the guide adds to, and mid.
        out: folder for the files.
    """

    guide: str
    prompts: tuple[str, ...]
    guidance: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0)
    steps: int = 20
    base: str = "emoji"
    seed: int = 0
    show: int = 5
    layers: tuple[str, ...] = ()
    out: Path = Path("visualize")


@dataclass(frozen=True)
class Visualization:
    """The written files, the numbers (the content of the JSON file) and a paragraph about them."""

    files: list[Path]
    document: dict[str, Any]
    text: str


def visualize(
    request: VisualizeRequest, command: Sequence[str] = (), progress: Progress | None = None
) -> Visualization:
    """Sample with the guide at every scale from the same noise, and draw its feature maps and their strength.

    Writes ``feature-maps.png``, ``strength.png`` and ``strength.json`` to ``request.out``, or numbered names if those
    exist.

    Args:
        command: the command line, for the provenance in the JSON file.

    Raises:
        InputError: for values out of range, an unknown guide, base or layer, or a guide that does not fit the base.
        PnpError: if a residual or an image is not finite, or a file cannot be written.
    """
    scales = sorted(set(request.guidance))
    _check(request, scales)
    base = resolve(request.base)
    guide = load_guide(request.guide)
    student = Student(base.unet().float(), guide)
    names = layer_names(len(guide.config["skip_channels"]))
    requested = _select_layers(request.layers, names)
    distilled = guide.config.get("sampling_steps")
    if distilled is not None and distilled != request.steps:
        warnings.warn(f"this guide was distilled for {distilled} sampling steps, not {request.steps}", stacklevel=2)
    make_folder(request.out)
    warn_of_long_prompts(base.tokenizer(), list(request.prompts))
    warn_of_syntax(request.prompts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = shown_steps(request.steps, request.show)
    recording = record(base, student.to(device), request.prompts, scales, request.steps, request.seed, shown, progress)

    chosen = requested or _usual(recording)
    parameters = {
        "prompts": list(request.prompts), "seed": request.seed, "steps": request.steps, "guidance": scales,
        "guide": request.guide, "base": request.base, "schedule": ddim.name,
        "shown_layers": [names[i] for i in chosen], "shown_steps": [s + 1 for s in shown],
    }  # fmt: skip
    summary = summarise(recording)
    folder = guide_folder(request.guide)
    document = {
        "schema": SCHEMA,
        "parameters": parameters,
        "weights": {
            "base": base.fingerprint()["all"],
            "guide": digest([sha256(p) for p in sorted(folder.glob("*.safetensors"))]),
        },
        "summary": summary,
        "layers": [
            asdict(layer) | {"white_noise_high_frequency": white_noise_share(layer.height, layer.width)}
            for layer in recording.layers
        ],
        "strength": _rows(recording),
        "provenance": provenance(command, device=torch.cuda.get_device_name() if device.type == "cuda" else None),
    }
    run = f"{shortened(folder.name)} on {shortened(Path(request.base).name)}"
    several_prompts = len(request.prompts) > 1
    prompt = excerpt(request.prompts[0])
    maps = draw_maps(recording, chosen, f"{run}, {prompt}, {request.steps} steps, seed {request.seed}")
    prompt_label = f"mean of {len(request.prompts)} prompts" if several_prompts else prompt
    chart = draw_strength(recording, f"Injected strength: {run}, {prompt_label}, {request.steps} steps")
    with deferred():
        files = _write(request.out, maps, chart, parameters, document)
    text = describe(summary, f"{run}, {prompt_label}, {request.steps} steps")
    return Visualization(files, document, text)


def _rows(recording: Recording) -> list[dict[str, Any]]:
    """Rows of numbers, one per (w, layer, step); the high-frequency share is None if nothing is added."""
    relative = recording.relative
    out = []
    for r, w in enumerate(recording.guidance):
        for i, layer in enumerate(recording.layers):
            for s, t in enumerate(recording.timesteps):
                high = float(recording.high[r, i, s])
                out.append({
                    "w": w, "layer": layer.name, "step": s + 1, "timestep": t,
                    "residual_rms": float(recording.residual[r, i, s]),
                    "feature_rms": float(recording.feature[r, i, s]),
                    "relative": float(relative[r, i, s]),
                    "high_frequency": None if np.isnan(high) else high,
                })  # fmt: skip
    return out


def _check(request: VisualizeRequest, scales: list[float]) -> None:
    prompts = list(request.prompts)
    if prompts and not scales:
        raise InputError("no guidance scale was given; pass at least one")
    for w in scales or [1.0]:  # 1.0 makes check_request also refuse an empty list of prompts
        check_request(prompts, [request.seed] * len(prompts), [w] * len(prompts), request.steps)
    if len(scales) > MOST_SCALES:
        raise InputError(f"{len(scales)} guidance scales were given; one figure holds at most {MOST_SCALES}")
    if not 1 <= request.show <= MOST_STEPS:
        raise InputError(f"show is {request.show}; it must be between 1 and {MOST_STEPS}")
    check_writable_folder(request.out)


def _select_layers(words: Sequence[str], names: list[str]) -> list[int]:
    """Indices of the requested layers, in that order and without duplicates; empty for the default layers."""
    if list(words) == ["all"]:
        return list(range(len(names)))
    indices: list[int] = []
    for word in words:
        if word in names:
            indices.append(names.index(word))
        elif word in map(str, range(len(names))):
            indices.append(int(word))
        else:
            raise InputError(f"no layer '{word}'; known: {', '.join(names)}, the indices 0 to {len(names) - 1}, or all")
    return list(dict.fromkeys(indices))


def _usual(recording: Recording) -> list[int]:
    """The default layers: the shallowest and the deepest skip that the guide adds to, and mid."""
    mid = len(recording.layers) - 1
    skips = [i for i in recording.emitting if i != mid]
    return list(dict.fromkeys([*skips[:1], *skips[-1:], mid]))


def _write(
    folder: Path, maps: np.ndarray, chart: np.ndarray, parameters: dict[str, Any], document: dict[str, Any]
) -> list[Path]:
    """Write a run's files as NAME, or if any of them exists as NAME-2 …, so that all of a run have the same number."""
    text = as_text(document, folder / "strength.json").encode()
    images = [encode_image(pixels, parameters, "png", folder) for pixels in (maps, chart)]
    number = 1
    while True:
        tail = "" if number == 1 else f"-{number}"
        paths = [folder / f"{name}{tail}{suffix}" for name, suffix in _FILES]
        if write_all_new(dict(zip(paths, [*images, text], strict=True))):
            return paths
        number += 1

"""Monitoring of a run: held-out error by (t, w), a grid of images, TensorBoard."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle.store import write_bytes
from ..models.latents import to_vae
from ..models.student import Student, cfg
from ..sampling.schedules import Schedule, ddim
from .run import TeacherModel
from .states import States

W_BINS = (1.5, 2.0, 3.0, 5.0, 8.0)
T_BINS = (0, 200, 400, 600, 800)
GRID_PROMPTS = 6


@torch.no_grad()
def run_schedule(predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, schedule: Schedule) -> Tensor:
    """Sample from ``x`` to the clean latents, with one ``predict(x [B, …], timestep [B])`` per step."""
    for t, scale, out in zip(schedule.timesteps, schedule.x_scale, schedule.output_scale, strict=True):
        x = float(scale) * x + float(out) * predict(x, torch.full((len(x),), int(t), device=x.device))
    return x


def predict_states(student: nn.Module, states: States, pick: Tensor, w: Tensor) -> Tensor:
    """The student's predictions for some states, ``[N, C, H, W]`` float32."""
    device = w.device
    rows, negative = states.prompt[pick], states.negative[pick]
    nothing = torch.full_like(negative, states.conditions.empty)
    return student(
        states.sample[pick].float().to(device), states.timestep[pick].to(device),
        states.conditions.text(rows, device), w,
        negative=states.conditions.text(negative, device),
        added_cond_kwargs=states.conditions.added(rows, device),
        empty=states.conditions.text(nothing, device),
    ).float()  # fmt: skip


def target_of(states: States, pick: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's guided prediction eps_w and its plain conditional one, ``[N, C, H, W]`` float32 each."""
    conditional = states.conditional[pick].float().to(w.device)
    unconditional = states.unconditional[pick].float().to(w.device)
    return unconditional + w[:, None, None, None] * (conditional - unconditional), conditional


@torch.no_grad()
def held_out_error(
    student: Student,
    states: States,
    rows: list[int],
    progress: Callable[[int, int], None] | None = None,
    limit: int = 512,
) -> dict[str, Any]:
    """Share of the guidance that is left unexplained on held-out states, by (t, w).

    ``residual`` is ‖student − eps_w‖² / ‖eps_c − eps_w‖²: 1 without a guide, 0 for a perfect one.  The timesteps where
    guidance is strong dominate it; ``mean_of_bins`` weighs all (t, w) bins equally.
    """
    device = next(student.guide.parameters()).device
    sums: dict[tuple[int, float], list[float]] = {}
    rows = rows[:: max(1, len(rows) // limit)]
    for start in range(0, len(rows), 64):
        pick = torch.tensor(rows[start : start + 64])
        for w_value in W_BINS:
            w = torch.full((len(pick),), w_value, device=device)
            prediction = predict_states(student, states, pick, w)
            target, conditional = target_of(states, pick, w)
            student_error = (prediction - target).pow(2).flatten(1).sum(1).tolist()
            unguided_error = (conditional - target).pow(2).flatten(1).sum(1).tolist()
            for t, a, b in zip(states.timestep[pick].tolist(), student_error, unguided_error, strict=True):
                low = max(x for x in T_BINS if x <= t)
                cell = sums.setdefault((low, w_value), [0.0, 0.0])
                cell[0] += a
                cell[1] += b
        if progress is not None:
            progress(min(start + 64, len(rows)), len(rows))
    bins = [{"t_from": t, "w": w, "residual": a / b if b else None} for (t, w), (a, b) in sorted(sums.items())]
    total = [sum(c[i] for c in sums.values()) for i in (0, 1)]
    known = [b["residual"] for b in bins if b["residual"] is not None]
    return {
        "states": len(rows),
        "residual": total[0] / total[1] if total[1] else None,
        "mean_of_bins": sum(known) / len(known) if known else None,
        "bins": bins,
    }


@contextmanager
def averaged(guide: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within the context, ``guide`` has ``weights`` and is in evaluation mode; afterwards, its own are restored."""
    originals = {k: p.detach().clone() for k, p in guide.named_parameters() if k in weights}
    parameters = dict(guide.named_parameters())
    training = guide.training
    with torch.no_grad():
        for k, v in weights.items():
            parameters[k].copy_(v)
    guide.eval()
    try:
        yield
    finally:
        guide.train(training)
        with torch.no_grad():
            for k, v in originals.items():
                parameters[k].copy_(v)


class ImageGrid:
    """A labelled grid of the teacher's guided images, the student's and the unguided ones, from the same noise."""

    def __init__(self, teacher: TeacherModel, steps: int, w: float = 3.0, seed: int = 0) -> None:
        self._teacher, self._w = teacher, w
        self._schedule = ddim(teacher.scheduler, steps)
        stride = max(1, len(teacher.prompts) // GRID_PROMPTS)
        self._rows = torch.arange(0, len(teacher.prompts), stride)[:GRID_PROMPTS]
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(len(self._rows), *teacher.sample_shape, generator=generator).to(teacher.device)
        self._vae = teacher.base.vae().float().to(teacher.device)
        self._fixed: list[tuple[str, np.ndarray]] = []

    @torch.no_grad()
    def draw(self, student: Student, schedule: Schedule | None = None) -> np.ndarray:
        """The grid, uint8 ``[H, W, 3]``; the student may sample by a shorter ``schedule``."""
        from ..runtime.images import grid

        t, rows = self._teacher, self._rows
        c = t.conditions
        n, device = len(rows), t.device
        text, empty = c.text(rows, device), c.text(torch.full((n,), c.empty), device)
        w = torch.full((n,), self._w, device=device)
        if not self._fixed:
            empty_rows = torch.full((n,), c.empty)
            added = c.added(torch.cat([empty_rows, rows]), device)
            guided = run_schedule(lambda x, s: cfg(t.unet, x, s, text, empty, w, added), self._noise, self._schedule)
            plain = run_schedule(
                lambda x, s: t.unet(x, s, text, added_cond_kwargs=c.added(rows, device)).sample,
                self._noise, self._schedule,
            )  # fmt: skip
            self._fixed = [("teacher, CFG", self._pixels(guided)), ("no guidance", self._pixels(plain))]
        student_latents = run_schedule(
            lambda x, s: student(x, s, text, w, negative=empty, added_cond_kwargs=c.added(rows, device)),
            self._noise, schedule or self._schedule,
        )  # fmt: skip
        strips = [self._fixed[0], ("guide", self._pixels(student_latents)), self._fixed[1]]
        labels = [t.prompts[i] for i in rows.tolist()]
        return grid([(name, list(pixels)) for name, pixels in strips], labels, f"w = {self._w:g}")

    @torch.no_grad()
    def _pixels(self, latents: Tensor) -> np.ndarray:
        out = self._vae.decode(to_vae(latents, self._vae), return_dict=False)[0]
        return out.div(2).add(0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(pixels: np.ndarray, path: Path) -> None:
    """Write pixels, uint8 ``[H, W, 3]``, as a PNG, atomically."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    write_bytes(stream.getvalue(), path)


class LossLog:
    """Logs and reports the loss of a run at every step.

    Attributes:
        smooth: exponential mean of the loss; None before the first step.
    """

    smooth: float | None = None

    def __init__(self, board: Board | None, report: Callable[[int, int, str], object]) -> None:
        self._board, self._report = board, report

    def __call__(self, step: int, steps: int, value: float, rate: float) -> None:
        """Log the loss ``value`` and the learning rate of a step."""
        self.smooth = value if self.smooth is None else 0.98 * self.smooth + 0.02 * value
        if self._board is not None:
            self._board.numbers(step, loss=value, learning_rate=rate)
        self._report(step, steps, f"loss {self.smooth:.4f}")


class Board:
    """TensorBoard logs in ``folder``; does nothing if TensorBoard is not installed."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer: Any = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def numbers(self, step: int, **values: float) -> None:
        """Log the scalars of a step."""
        for name, value in values.items():
            self._call("add_scalar", name, value, step)

    def error(self, step: int, held_out: dict[str, Any]) -> None:
        """Log the held-out error: overall, and for each t averaged over w."""
        if held_out["residual"] is None:
            return
        self.numbers(step, held_out_residual=held_out["residual"], held_out_mean_of_bins=held_out["mean_of_bins"])
        for t in T_BINS:
            residuals = [b["residual"] for b in held_out["bins"] if b["t_from"] == t and b["residual"] is not None]
            if residuals:
                self.numbers(step, **{f"held_out/t_from_{t}": sum(residuals) / len(residuals)})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log an image, uint8 ``[H, W, 3]``."""
        self._call("add_image", name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._call("close")

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call the writer; if the disk has no room for logs, logging stops and training continues."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments, **options)
        except OSError as e:
            self._writer = None
            warnings.warn(f"TensorBoard logging stopped ({e.strerror or e})", stacklevel=3)

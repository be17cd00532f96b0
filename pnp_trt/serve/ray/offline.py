"""A table of prompts over several workers with Ray Data: like :mod:`pnp_trt.serve.offline`, with an engine per worker.

The image files are the record of progress: a worker writes each atomically and keeps existing ones.  If a worker dies,
Ray gives its batch to another, which generates only the missing images.  A later run resumes in the same way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import PnpError
from ...io.text import printable
from ...runtime.pipeline import Pipeline
from ...sampling.step_loop import SLOTS
from ..offline import OfflinePlan, Progress, Tally
from ..offline import generate as generate_here
from .cluster import cluster, placed

#: size of a batch in engine calls; only its last calls are not full
_CALLS = 8


@dataclass(frozen=True)
class WorkerTask:
    """Task of every worker.

    Attributes:
        bundle, out: folders, which must have the same path on every node of the cluster.
        defaults, seed, kind: as for :meth:`pnp_trt.serve.offline.OfflinePlan.of`.
        slots: of each worker's engine.
        provider: as for ``Pipeline.load``.
    """

    bundle: Path
    out: Path
    defaults: Mapping[str, Any]
    seed: int = 0
    kind: str = "png"
    slots: int = SLOTS
    provider: str = "auto"


def generate(
    task: WorkerTask, rows: Sequence[Mapping[str, Any]], replicas: int | None = None, progress: Progress | None = None
) -> Tally:
    """Generate one image file per row, like :func:`pnp_trt.serve.offline.generate`, with workers that Ray restarts.

    Args:
        rows: from ``read_rows``.
        replicas: number of workers; None takes the cluster's GPUs, or 1.

    Raises:
        InputError: for a row that cannot be served, before any image is generated, or a file of another row in ``out``.
        PnpError: if Ray or a worker fails permanently; the images before that remain.
    """
    with cluster(replicas or 1):
        workers, resources = placed(task.provider, replicas)
        with _errors():
            todo, total = _planned(task, rows, resources)
            existing = total - len(todo)
            for done in _generate(task, todo, workers, resources):
                if progress is not None:
                    progress(existing + done, total)
    return Tally(total - existing, existing)


def _planned(
    task: WorkerTask, rows: Sequence[Mapping[str, Any]], resources: Mapping[str, float]
) -> tuple[list[dict[str, Any]], int]:
    """The rows without an image, as input for the workers, and the total number of rows.

    The rows are checked in a Ray task, because the engine may only load there.
    """
    import ray

    planned: tuple[list[dict[str, Any]], int] = ray.get(ray.remote(**resources)(plan).remote(task, list(rows)))
    return planned


def plan(task: WorkerTask, rows: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Remote task of :func:`_planned`."""
    pipeline = Pipeline.load(task.bundle, provider=task.provider)
    offline_plan = OfflinePlan.of(pipeline, rows, task.out, defaults=task.defaults, seed=task.seed, kind=task.kind)
    todo = [
        {"index": i, "file": str(offline_plan.files[i]), "row": json.dumps(offline_plan.rows[i])}
        for i in offline_plan.missing
    ]
    return todo, len(offline_plan.files)


def _generate(
    task: WorkerTask, todo: list[dict[str, Any]], workers: int, resources: Mapping[str, float]
) -> Iterator[int]:
    """Generate the missing images; yields the number of completed rows after each batch."""
    import ray.data

    if not todo:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    batch = min(_CALLS * task.slots, -(-len(todo) // workers))
    rows = ray.data.from_items(todo, override_num_blocks=-(-len(todo) // batch))
    results = rows.map_batches(
        Worker, fn_constructor_args=(task,), batch_size=None, compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )  # fmt: skip
    done = 0
    for part in results.iter_batches(batch_size=None, prefetch_batches=0):
        done += int(part["done"].sum())
        yield done


class Worker:
    """An engine in a Ray Data actor."""

    def __init__(self, task: WorkerTask) -> None:
        import warnings

        warnings.filterwarnings("ignore", category=UserWarning)
        self._task = task
        self._pipeline = Pipeline.load(task.bundle, provider=task.provider)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Generate and write the images of some rows.

        Args:
            batch: arrays ``[N]`` of ``index``, ``file`` and ``row``, which is a JSON object.
        """
        import numpy as np

        rows, files = [json.loads(row) for row in batch["row"]], [Path(file) for file in batch["file"]]
        part = OfflinePlan.part(self._pipeline, map(int, batch["index"]), rows, files, self._task.kind)
        generate_here(self._pipeline, part, self._task.slots)
        return {"done": np.array([len(rows)])}


@contextmanager
def _errors() -> Iterator[None]:
    """Convert errors of a worker and of Ray to this package's errors."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as e:
        cause = getattr(e, "cause", None)
        if isinstance(cause, PnpError):
            raise cause from None
        raise PnpError(f"the workers failed ({printable(e, limit=400)}); run it again to resume") from e

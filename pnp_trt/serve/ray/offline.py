"""A table of prompts over several workers by Ray Data: as :mod:`pnp_trt.serve.offline`, with an engine per worker.

The files are the record: a worker writes each whole or not at all, and keeps those that are there.  So a batch that Ray
gives to another worker, since the first one died, makes what is missing of it, and a later run resumes as ever.
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

#: rows of a batch, in the rows of an engine's call: at its end the calls are not full
_CALLS = 8


@dataclass(frozen=True)
class WorkerTask:
    """What every worker does.

    Attributes:
        bundle, out: folders, which every node of the cluster has at the same place.
        defaults, seed, kind: as of :meth:`pnp_trt.serve.offline.OfflinePlan.of`.
        slots: of a worker's engine.
        provider: as of ``Pipeline.load``.
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
    """One image file a row, as :func:`pnp_trt.serve.offline.generate`, by workers that Ray starts again when they die.

    Args:
        rows: as ``read_rows`` gives them.
        replicas: workers; None takes the cluster's GPUs, or 1.

    Raises:
        InputError: for a row that cannot be served, before any image is made, or a file of another row in ``out``.
        PnpError: if Ray or a worker fails for good; the images before it are there.
    """
    with cluster(replicas or 1):
        workers, resources = placed(task.provider, replicas)
        with _errors():
            todo, total = _planned(task, rows, resources)
            kept = total - len(todo)
            for done in _made(task, todo, workers, resources):
                if progress is not None:
                    progress(kept + done, total)
    return Tally(total - kept, kept)


def _planned(
    task: WorkerTask, rows: Sequence[Mapping[str, Any]], resources: Mapping[str, float]
) -> tuple[list[dict[str, Any]], int]:
    """The rows without an image, each as what a worker reads, and the number of all; checked where the engine loads."""
    import ray

    found: tuple[list[dict[str, Any]], int] = ray.get(ray.remote(**resources)(plan).remote(task, list(rows)))
    return found


def plan(task: WorkerTask, rows: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Run by Ray: see :func:`_planned`."""
    pipeline = Pipeline.load(task.bundle, provider=task.provider)
    found = OfflinePlan.of(pipeline, rows, task.out, defaults=task.defaults, seed=task.seed, kind=task.kind)
    todo = [{"index": i, "file": str(found.files[i]), "row": json.dumps(found.rows[i])} for i in found.missing]
    return todo, len(found.files)


def _made(task: WorkerTask, todo: list[dict[str, Any]], workers: int, resources: Mapping[str, float]) -> Iterator[int]:
    """Rows done, after each batch."""
    import ray.data

    if not todo:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    batch = min(_CALLS * task.slots, -(-len(todo) // workers))
    rows = ray.data.from_items(todo, override_num_blocks=-(-len(todo) // batch))
    made = rows.map_batches(
        Worker, fn_constructor_args=(task,), batch_size=None, compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )  # fmt: skip
    done = 0
    for part in made.iter_batches(batch_size=None, prefetch_batches=0):
        done += int(part["done"].sum())
        yield done


class Worker:
    """An engine in an actor of Ray Data."""

    def __init__(self, task: WorkerTask) -> None:
        import warnings

        warnings.filterwarnings("ignore", category=UserWarning)
        self._task = task
        self._pipeline = Pipeline.load(task.bundle, provider=task.provider)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Generate and write the images of some rows.

        Args:
            batch: arrays ``[N]`` of ``index``, ``file`` and ``row``, a JSON object each.
        """
        import numpy as np

        rows, files = [json.loads(row) for row in batch["row"]], [Path(file) for file in batch["file"]]
        part = OfflinePlan.part(self._pipeline, map(int, batch["index"]), rows, files, self._task.kind)
        generate_here(self._pipeline, part, self._task.slots)
        return {"done": np.array([len(rows)])}


@contextmanager
def _errors() -> Iterator[None]:
    """Errors of a worker and of Ray as this package states them."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as e:
        cause = getattr(e, "cause", None)
        if isinstance(cause, PnpError):
            raise cause from None
        raise PnpError(f"the workers failed ({printable(e, limit=400)}); run it again to resume") from e

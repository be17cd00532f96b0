"""Figures of a running server in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...errors import PnpError
from ..engine import Engine, Job, Watcher
from .errors import status_of

#: seconds
_CALL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20)
_REQUEST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)
#: upper ends of the groups that requests are counted in by their steps, which clients choose freely
_STEPS = (10, 25, 50)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, where = "pnp_trt", {"registry": self.registry}
        self.requests = Counter(f"{name}_requests", "Requests by outcome", ["engine", "status"], **where)  # type: ignore[arg-type]
        self.images = Counter(f"{name}_images", "Images generated", ["engine", "method"], **where)  # type: ignore[arg-type]
        self.calls = Histogram(
            f"{name}_call_seconds", "Network calls", ["engine", "batch"], buckets=_CALL, registry=self.registry
        )
        self.rows = Counter(f"{name}_rows", "Rows of network calls", ["engine", "kind"], **where)  # type: ignore[arg-type]
        self.seconds = Histogram(
            f"{name}_request_seconds", "From submission to the last image", ["engine", "method", "steps"],
            buckets=_REQUEST, registry=self.registry,
        )  # fmt: skip
        self.admission = Histogram(
            f"{name}_admission_seconds", "From submission to the first step", ["engine"], buckets=_REQUEST,
            registry=self.registry,
        )  # fmt: skip
        self.gauges = {
            kind: Gauge(f"{name}_{kind}", text, ["engine"], registry=self.registry)
            for kind, text in (
                ("images_waiting", "Images in the queue"),
                ("rows_running", "Rows of a call in use"),
                ("slots", "Rows of a call, at most"),
                ("lora_engines", "Engines with LoRAs that are loaded"),
                ("lora_requests_waiting", "Requests whose engine with LoRAs is being made"),
            )
        }

    def watch(self, engine: str) -> Watcher:
        """What tells these figures of an engine."""
        return _Watcher(self, engine)

    def of(self, name: str, engines: Callable[[], Sequence[Engine]], loading: Callable[[], int] | None = None) -> None:
        """Read the gauges of an engine, and of those with LoRAs beside it, whenever the metrics are read.

        Args:
            engines: the engine itself first.
            loading: requests that wait for an engine with LoRAs; None where there are none.
        """
        read: dict[str, Callable[[], float]] = {
            "images_waiting": lambda: sum(engine.waiting for engine in engines()),
            "rows_running": lambda: sum(engine.rows_running for engine in engines()),
            "slots": lambda: sum(engine.slots for engine in engines()),
            "lora_engines": lambda: len(engines()) - 1,
            "lora_requests_waiting": loading or (lambda: 0),
        }
        for kind, value in read.items():
            self.gauges[kind].labels(name).set_function(value)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)


class _Watcher(Watcher):
    def __init__(self, metrics: Metrics, engine: str) -> None:
        self._metrics, self._engine = metrics, engine

    def stepped(self, rows: int, padded: int, calls: int, seconds: float) -> None:
        batch = str((rows + padded) // calls) if calls else "0"
        self._metrics.calls.labels(self._engine, batch).observe(seconds / max(1, calls))
        self._metrics.rows.labels(self._engine, "used").inc(rows)
        self._metrics.rows.labels(self._engine, "padded").inc(padded)

    def ended(self, job: Job, error: PnpError | None) -> None:
        held, prepared = self._metrics, job.prepared
        held.requests.labels(self._engine, "200" if error is None else str(status_of(error))).inc()
        if job.admitted is not None:
            held.admission.labels(self._engine).observe(job.admitted - job.submitted)
        if error is None and job.ended is not None:
            held.images.labels(self._engine, prepared.method).inc(job.count)
            steps = next((f"<= {most}" for most in _STEPS if prepared.steps <= most), f"> {_STEPS[-1]}")
            held.seconds.labels(self._engine, prepared.method, steps).observe(job.ended - job.submitted)

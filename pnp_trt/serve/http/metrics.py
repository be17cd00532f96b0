"""Metrics of a running server in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...errors import PnpError
from ..engine import Engine, Job, Watcher
from .errors import status_of

#: upper bounds of histogram buckets, in seconds
_CALL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20)
_REQUEST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)
#: upper bounds of the groups by number of steps; clients choose it freely, so it cannot be a label itself
_STEPS = (10, 25, 50)


class Metrics:
    """Metrics with a separate registry, so that one process may run several servers."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, options = "pnp_trt", {"registry": self.registry}
        self.requests = Counter(f"{name}_requests", "Requests by outcome", ["engine", "status"], **options)  # type: ignore[arg-type]
        self.images = Counter(f"{name}_images", "Images generated", ["engine", "method"], **options)  # type: ignore[arg-type]
        self.calls = Histogram(
            f"{name}_call_seconds", "Network calls", ["engine", "batch"], buckets=_CALL, registry=self.registry
        )
        self.rows = Counter(f"{name}_rows", "Rows of network calls", ["engine", "kind"], **options)  # type: ignore[arg-type]
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
        """A watcher that updates these metrics for an engine."""
        return _Watcher(self, engine)

    def of(self, name: str, engines: Callable[[], Sequence[Engine]], loading: Callable[[], int] | None = None) -> None:
        """Add gauges for an engine and its engines with LoRAs; they are evaluated whenever the metrics are read.

        Args:
            engines: returns the engine itself, then those with LoRAs.
            loading: returns the number of requests that wait for an engine with LoRAs; None without LoRAs.
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
        """All metrics as text."""
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
        metrics, prepared = self._metrics, job.prepared
        metrics.requests.labels(self._engine, "200" if error is None else str(status_of(error))).inc()
        if job.admitted is not None:
            metrics.admission.labels(self._engine).observe(job.admitted - job.submitted)
        if error is None and job.ended is not None:
            metrics.images.labels(self._engine, prepared.method).inc(job.count)
            steps = next((f"<= {most}" for most in _STEPS if prepared.steps <= most), f"> {_STEPS[-1]}")
            metrics.seconds.labels(self._engine, prepared.method, steps).observe(job.ended - job.submitted)

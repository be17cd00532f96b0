"""A logger that collects messages of the compiler and the runtime, for use in error messages."""

from __future__ import annotations

from typing import Any

from .layer_report import BEGIN


def message_logger(trt: Any) -> Any:
    """Return a ``trt.ILogger`` that collects messages; its class cannot be defined before the package is loaded."""

    class Logger(trt.ILogger):
        """Collects errors, the first 20 warnings, and the report of the layers."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING and len(self.warnings) < 20:
                self.warnings.append(message)
            elif message.startswith(BEGIN):
                self.layers = message

        def summary(self, what: str) -> str:
            first = " ".join(self.errors[0].split())[:400] if self.errors else "no reason given"
            return f"{what}: {first}"

    return Logger()

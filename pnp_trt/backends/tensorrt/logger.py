"""Messages of the compiler and of the runtime, collected for one sentence."""

from __future__ import annotations

from typing import Any

from .layer_report import BEGIN


def message_logger(trt: Any) -> Any:
    """A ``trt.ILogger`` that collects messages; the class can only be defined once the package is loaded."""

    class Logger(trt.ILogger):
        """Errors, the first 20 warnings, and the report of the layers."""

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
            first = " ".join(self.errors[0].split())[:400] if self.errors else "it gives no reason"
            return f"{what}: {first}"

    return Logger()

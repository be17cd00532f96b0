"""Control a page in headless Chromium through Chromium's DevTools protocol (CDP), over a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bench.browser import chromium


class Page:
    """One tab; use :func:`opened`."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer, self._number = write, read, b"", 0
        self.session: str | None = None
        #: console output of the page, and uncaught exceptions
        self.console: list[str] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 600
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
            assert ready, "Chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        parameters, kind = event.get("params", {}), event.get("method")
        if kind == "Runtime.consoleAPICalled":
            self.console.append(f"{parameters['type']}: {[a.get('value') for a in parameters['args']]}")
        elif kind == "Runtime.exceptionThrown":
            self.console.append(f"exception: {parameters['exceptionDetails']}")
        elif kind == "Log.entryAdded":
            self.console.append(
                f"{parameters['entry']['level']}: {parameters['entry']['text']} {parameters['entry'].get('url', '')}"
            )

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + 600
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"), self.console)
            time.sleep(0.02)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key."""
        more = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **more)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the window's size in CSS pixels, and its colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        """Save the whole page as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened(url: str, folder: Path) -> Iterator[Page]:
    """Open a tab at ``url``; ``folder`` is for Chromium's profile."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
               f"--user-data-dir={folder}", "--hide-scrollbars", "about:blank"]  # fmt: skip
    (their_in, write), (read, their_out) = os.pipe(), os.pipe()

    def place() -> None:  # Chromium reads from descriptor 3 and writes to 4
        reader, writer = os.dup(their_in), os.dup(their_out)
        os.dup2(reader, 3)
        os.dup2(writer, 4)

    child = subprocess.Popen(command, preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL)
    os.close(their_in)
    os.close(their_out)
    try:
        page = Page(write, read)
        target = page.send("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            page.send(f"{domain}.enable")
        page.send("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        yield page
    finally:
        child.terminate()
        child.wait(30)
        os.close(write)
        os.close(read)

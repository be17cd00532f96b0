"""A page in headless Chromium that a test can act on: Chromium's own protocol (CDP), over a pair of pipes."""

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
        #: what the page wrote to its console, and exceptions that nothing caught
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
        found, kind = event.get("params", {}), event.get("method")
        if kind == "Runtime.consoleAPICalled":
            self.console.append(f"{found['type']}: {[a.get('value') for a in found['args']]}")
        elif kind == "Runtime.exceptionThrown":
            self.console.append(f"exception: {found['exceptionDetails']}")
        elif kind == "Log.entryAdded":
            self.console.append(f"{found['entry']['level']}: {found['entry']['text']} {found['entry'].get('url', '')}")

    def run(self, script: str) -> Any:
        """The value of an expression; of a promise what it becomes."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + 600
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"), self.console)
            time.sleep(0.02)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, down and up."""
        more = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **more)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window in CSS pixels, and the scheme of its colours."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened(url: str, folder: Path) -> Iterator[Page]:
    """A tab at ``url``; ``folder`` takes Chromium's profile."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
               f"--user-data-dir={folder}", "--hide-scrollbars", "about:blank"]  # fmt: skip
    (their_in, write), (read, their_out) = os.pipe(), os.pipe()

    def place() -> None:  # Chromium reads from descriptor 3 and writes to 4
        taken, given = os.dup(their_in), os.dup(their_out)
        os.dup2(taken, 3)
        os.dup2(given, 4)

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

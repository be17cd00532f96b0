"""Load a page in headless Chromium, and read its console output and its layout as measured by a probe."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: Runs in a copy of the page: measures sizes, and lists elements that stick out, chart texts that are clipped or
#: overlap, and images that did not load.
PROBE = """
const wide = innerWidth, found = {width: wide, scroll: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor, sticksOut: [], figures: {}, clipped: [], overlaps: [],
  blind: []};
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('.scroll > *, pre > *, svg *')) continue;
  const box = e.getBoundingClientRect();
  if (box.width && (box.right > wide + 1 || box.left < -1)) found.sticksOut.push(e.tagName + '.' + e.className);
}
for (const figure of document.querySelectorAll('figure')) {
  found.figures[figure.id] = [...figure.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
      .map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [said, b] of texts)
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
        found.clipped.push(figure.id + ': ' + said);
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const [p, a] = texts[i], [q, b] = texts[j];
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 2 && y > Math.min(a.height, b.height) / 3) found.overlaps.push(figure.id + ': ' + p + ' | ' + q);
    }
    return [Math.round(box.width), Math.round(box.height), svg.getAttribute('aria-label')];
  });
}
for (const img of document.images) if (!img.naturalWidth) found.blind.push(img.alt);
parent.postMessage(JSON.stringify(found), '*');
"""
#: Shows the page in a frame: a Chromium window is at least 500 pixels wide, a frame can be as narrow as a phone.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><style>
iframe {{ width: {width}px; height: 900px; border: 0 }}</style><pre id="probe"></pre><script>
onmessage = event => {{ document.getElementById('probe').textContent = event.data; }};
</script><iframe src="{name}"></iframe>"""


@functools.cache
def chromium() -> str:
    """Return the path of Chromium; without one, skip the test."""
    executable = next((path for name in NAMES if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no Chromium is installed; apt install chromium")
    return executable


def _run(page: Path, *, dark: bool = False) -> subprocess.CompletedProcess[str]:
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,1000",
        "--hide-scrollbars", "--virtual-time-budget=3000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)


def console(page: Path) -> list[str]:
    """Return the lines of the browser's console, including errors and blocked loads."""
    return [line for line in _run(page).stderr.splitlines() if ":CONSOLE" in line]


def probe(page: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """Return the results of `PROBE` at a width of `width` pixels, in a copy whose policy allows the script."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy = page.with_name(f"probe-{page.name}")
    copy.write_text(text.replace("</body>", f"<script>onload = () => {{{PROBE}}}</script></body>"), encoding="utf-8")
    frame = page.with_name(f"frame-{page.name}")
    frame.write_text(FRAME.format(width=width, name=copy.name), encoding="utf-8")
    output = re.search(r'<pre id="probe">(.+?)</pre>', _run(frame, dark=dark).stdout, re.DOTALL)
    assert output, "the probe did not run"
    return dict(json.loads(html.unescape(output[1])))

"""The page in headless Chromium: generate, compare, cancel, history, keyboard, layout, contrast, a clean console."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pnp_trt.bundle.store import Bundle, cached_sha256
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.serve.engine import Engine
from pnp_trt.serve.loras import LoraEngines, LoraFile

from .conftest import Running, serving
from .devtools import Page, opened
from .test_http import get

#: finds text of low contrast (WCAG 2.2), overflowing elements, and controls that have no name or are too small
PROBE = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = {pale: [], sticksOut: [], nameless: [], small: []};
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height || e.closest('script, template')) continue;
    if (box.right > innerWidth + 1 || box.left < -1) found.sticksOut.push(e.tagName + '#' + e.id);
    const said = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (said && !e.disabled && !e.closest(':disabled')) {
      let behind = e, ground = [0, 0, 0, 0];
      while (behind && (ground = parse(getComputedStyle(behind).backgroundColor), ground.length > 3 && !ground[3]))
        behind = behind.parentElement;
      const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(ground)];
      const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      if (ratio < 4.5) found.pale.push(`${e.tagName} ${e.textContent.trim().slice(0, 20)} ${ratio.toFixed(1)}`);
    }
    if (e.matches('input, textarea, select, button')) {
      const name = e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length);
      if (!name) found.nameless.push(e.outerHTML.slice(0, 80));
      if (e.matches('button') && box.height < 24) found.small.push(e.id);
    }
  }
  for (const img of document.images)
    if (img.hasAttribute('src') && (!img.naturalWidth || !img.hasAttribute('alt'))) found.nameless.push(img.outerHTML);
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(server.url, tmp_path_factory.mktemp("chromium")) as page:
        page.wait("document.querySelector('#status').textContent === 'Ready.'")
        yield page


def fill(page: Page, **values: object) -> None:
    """Set fields by their ids."""
    for name, value in values.items():
        page.run(f"""(() => {{ const e = document.getElementById('{name}'); e.value = {value!r};
            e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); }})()""")


@pytest.mark.slow
def test_generate_compare_and_history(browser: Page, server: Running) -> None:
    assert browser.run("[...document.querySelectorAll('#engine option')].map(o => o.value)") == ["guided", "plain"]
    fill(browser, prompt="a red apple", w="4", steps="3", seed="5")
    assert browser.run("document.querySelector('#w-value').textContent") == "4"
    browser.run("document.querySelector('#prompt').focus()")
    browser.send(
        "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2
    )
    browser.wait("document.querySelector('#status').textContent === 'Done: 2 images.'")
    numbers = browser.run("[...document.querySelectorAll('#cards .numbers')].map(e => e.textContent)")
    assert numbers[0].startswith("3 evaluations, ") and numbers[1].startswith("6 evaluations, ")
    assert "guided: 3 evaluations in" in browser.run("document.querySelector('#verdict').textContent")
    sizes = browser.run("[...document.querySelectorAll('#cards img')].map(i => [i.naturalWidth, i.alt])")
    assert sizes == [[32, "a red apple, guided"], [32, "a red apple, CFG"]]
    fill(browser, prompt="another", steps="9")
    browser.run("document.querySelector('#history button').click()")
    assert browser.run("[document.querySelector('#prompt').value, document.querySelector('#steps').value]") == [
        "a red apple", "3",
    ]  # fmt: skip
    assert browser.run("document.activeElement.id") == "prompt"
    assert browser.console == []


@pytest.mark.slow
def test_progress_is_shown_while_an_image_is_generated(browser: Page, server: Running) -> None:
    """The page shows the step, a bar and a preview, as the server reports them while the engine is paused."""
    fill(browser, prompt="a panda", steps="50", seed="1")
    browser.run("""(() => { window.shown = []; document.querySelector('#compare').checked = false;
        new MutationObserver(changes => shown.push(...changes.map(c => c.target.src.slice(0, 15))))
          .observe(document.querySelector('#cards'), {subtree: true, attributes: true, attributeFilter: ['src']});
        })()""")
    with server.standing():
        browser.run("document.querySelector('#go').click()")
        server.wait_for(1)
        browser.wait("document.querySelector('.numbers').textContent.startsWith('step ')")
        assert browser.run("[document.querySelector('#go').disabled, document.querySelector('#stop').disabled]") == [
            True, False,
        ]  # fmt: skip
        (job,) = server.engines["guided"].jobs()
        done = job.progress().steps_done
        assert browser.run("document.querySelector('.numbers').textContent") == f"step {done} of 50"
        assert browser.run("document.querySelector('progress').value") == pytest.approx(done / 50)
    browser.wait("document.querySelector('#status').textContent === 'Done: one image.'")
    *previews, last = browser.run("shown")
    assert last == "data:image/png;" and previews and set(previews) == {"data:image/webp"}
    assert browser.run("document.querySelector('.frame').classList.contains('done')")
    assert browser.console == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "negative", "label", "cards"),
    [
        ("guided", "", "Also generate with CFG, two evaluations per step", ["guided", "CFG"]),
        ("guided", "blue", "Nothing to compare with", ["CFG"]),
        ("plain", "", "Also generate without guidance, one evaluation per step", ["CFG", "no guidance"]),
        ("plain", "blue", "Also generate without guidance, one evaluation per step", ["CFG", "no guidance"]),
    ],
)
def test_the_comparison_depends_on_the_engine_and_the_negative_prompt(
    browser: Page, engine: str, negative: str, label: str, cards: list[str]
) -> None:
    fill(browser, engine=engine, negative=negative, prompt="a cat", steps="2")
    browser.run("document.querySelector('#compare').checked = true")
    try:
        assert browser.run("document.querySelector('#compare-text').textContent") == label
        browser.run("document.querySelector('#go').click()")
        browser.wait("document.querySelector('#status').textContent.startsWith('Done')")
        assert browser.run("[...document.querySelectorAll('.card strong')].map(e => e.textContent)") == cards
        assert browser.console == []
    finally:
        fill(browser, engine="guided", negative="")


def _blocked(gate: threading.Event) -> Callable[[Callable[[Bundle], Engine]], LoraEngines]:
    """Offer one LoRA, ``sepia``, whose merging waits for ``gate`` and then fails."""

    def plug(bundle: Bundle, loras: Sequence[tuple[Path, float]]) -> Any:
        assert gate.wait(600)
        raise InputError("it is for another architecture; leave it out")

    def make(start: Callable[[Bundle], Engine]) -> LoraEngines:
        return LoraEngines({"sepia": LoraFile(Path(__file__), cached_sha256(Path(__file__)))}, plug, start)

    return make


@pytest.mark.slow
def test_a_request_that_waits_for_its_lora_is_shown_and_can_be_cancelled(
    pipelines: dict[str, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()

    def waiting(count: int) -> None:
        deadline = time.monotonic() + 600
        while get(server, "/readyz")["lora_requests_waiting"] != count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with serving({"guided": pipelines["guided"]}, loras=_blocked(gate)) as server, opened(server.url, tmp_path) as page:
        page.wait("document.querySelector('#status').textContent === 'Ready.'")
        assert page.run("[...document.querySelectorAll('#lora option')].map(o => o.value)") == ["", "sepia"]
        fill(page, lora="sepia", scale="0.5", steps="3")
        try:
            page.run("document.querySelector('#go').click()")
            page.wait("document.querySelector('.numbers').textContent === 'loading the LoRA'")
            assert get(server, "/readyz")["lora_requests_waiting"] == 1
            page.run("document.querySelector('#stop').click()")
            page.wait("document.querySelector('#status').textContent === 'Cancelled.'")
            assert page.run("[...document.querySelectorAll('.numbers')].map(e => e.textContent)") == ["cancelled"]
            waiting(0)
            assert page.console == []
            page.run("document.querySelector('#go').click()")  # will show the error of the LoRA
            waiting(1)
        finally:
            gate.set()
        page.wait("document.querySelector('#status').classList.contains('wrong')")
        assert "cannot use the LoRA" in page.run("document.querySelector('#status').textContent")
    assert "another architecture" in capsys.readouterr().err  # what the server prints for its operator


@pytest.mark.slow
def test_escape_cancels_and_errors_are_shown(browser: Page, server: Running) -> None:
    fill(browser, steps="50")
    with server.standing():
        browser.run("document.querySelector('#go').click()")
        server.wait_for(1)
        browser.press("Escape", 27)
        server.gate.set()
        browser.wait("document.querySelector('#status').textContent === 'Cancelled.'")
    server.wait_for(0)
    fill(browser, steps="2", prompt="x" * 10_001)
    browser.run("document.querySelector('#form').noValidate = true; document.querySelector('#go').click()")
    browser.wait("document.querySelector('#status').classList.contains('wrong')")
    assert "prompt: String should have at most 10000" in browser.run("document.querySelector('#status').textContent")
    fill(browser, prompt="a panda")
    # the browser itself logs error responses, such as that to the second request
    assert ["status of 400" in line for line in browser.console] == [True], browser.console
    browser.console.clear()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_layout_names_and_contrast_are_accessible(browser: Page, width: int, dark: bool, tmp_path: Path) -> None:
    browser.look(width, 900, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(PROBE) == {"pale": [], "sticksOut": [], "nameless": [], "small": []}


@pytest.mark.slow
def test_every_control_is_reached_by_the_keyboard(browser: Page) -> None:
    browser.look(1280, 900)
    browser.run("document.activeElement.blur(); window.getSelection().removeAllRanges(); scrollTo(0, 0)")
    browser.run("document.querySelector('#prompt').focus()")
    focused = ["prompt"]
    for _ in range(14):
        browser.press("Tab", 9)
        focused.append(browser.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"engine", "schedule", "w", "steps", "seed", "dice", "compare", "SUMMARY", "go"} <= set(focused)

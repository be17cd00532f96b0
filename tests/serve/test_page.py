"""The page in headless Chromium: generate, compare, cancel, history, keyboard, layout, contrast, a clean console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Running
from .devtools import Page, opened

#: contrast of every text with what is behind it (WCAG 2.2), what sticks out, controls without a name or too small
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


@pytest.mark.slow
def test_cancel_by_escape_and_an_error_are_told(browser: Page, server: Running) -> None:
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
    # the browser itself notes answers that are errors, such as those to the two requests above
    assert [line for line in browser.console if "Failed to load resource" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_layout_names_and_contrast(browser: Page, width: int, dark: bool, tmp_path: Path) -> None:
    browser.look(width, 900, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(PROBE) == {"pale": [], "sticksOut": [], "nameless": [], "small": []}


@pytest.mark.slow
def test_every_control_is_reached_by_the_keyboard(browser: Page) -> None:
    browser.look(1280, 900)
    browser.run("document.activeElement.blur(); window.getSelection().removeAllRanges(); scrollTo(0, 0)")
    browser.run("document.querySelector('#prompt').focus()")
    seen = ["prompt"]
    for _ in range(14):
        browser.press("Tab", 9)
        seen.append(browser.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"engine", "schedule", "w", "steps", "seed", "dice", "compare", "SUMMARY", "go"} <= set(seen)

"""The demo on a free port in a thread, and Chromium in front of it that minds consoles and requests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from nest_runtime.demo.state import DemoState

CHROMIUM = os.environ.get("NEST_CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
WAIT = 90_000  # milliseconds for anything the page is to show, on a machine with other work too
LOST = 20_000  # milliseconds without a sign of an answer
PICTURES = "NEST_ARTIFACTS"  # a folder where screenshots are kept


def why_no_browser() -> str:
    """Why browser tests cannot run here, or nothing."""
    from importlib.util import find_spec

    missing = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "" if Path(CHROMIUM).exists() else f"no Chromium at {CHROMIUM} (set NEST_CHROMIUM)"


@contextmanager
def running(state: DemoState, logins: dict[str, str] | None = None) -> Iterator[str]:
    """The demo of a desk until the context ends; gives its URL."""
    import uvicorn

    from nest_runtime.demo.server import Listen, application, bind

    listen = Listen(port=0, logins=logins or {})
    port = bind(listen)
    config = uvicorn.Config(application(state, listen), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the demo ended"
        assert time.monotonic() < until, "the demo did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        port.close()


@dataclass
class Tab:
    """A page of the demo.

    Attributes:
        page: Playwright's.
        complaints: errors and warnings of the console, failed answers, and requests that left this machine.
        folder: where screenshots go.
    """

    page: Page
    folder: Path
    complaints: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Begin to mind what the page does."""
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("request", self._asked)
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._answered)

    def open(self, url: str, first: str = "v") -> None:
        """Load the page and wait until it can be used: until the patch chosen at first begins with ``first``."""
        self.page.set_default_timeout(WAIT)
        self.page.goto(url)
        chosen = "first => document.querySelector('#picker input')?.value.startsWith(first)"
        self.page.wait_for_function(chosen, arg=first)

    def show(self, tab: str) -> None:
        """Go to a tab."""
        self.page.get_by_role("tab", name=tab).click()

    def choose(self, place: str, option: str) -> None:
        """Choose from a list, by the beginning of an option."""
        self.page.click(f"#{place} input")
        self.page.get_by_role("option").filter(has_text=option).first.click()

    def ask(self, prompt: str = "") -> tuple[Locator, Locator]:
        """Send a prompt (what stands in the box, without one), wait for both answers, and give them."""
        before = self.page.locator("#conversation .nr-sides").count()
        if prompt:
            self.page.fill("#prompt textarea", prompt)
        self.page.click("#send")
        try:
            self.page.locator("#conversation .nr-sides").nth(before).wait_for(timeout=LOST)
        except Exception:  # a click on a page that is still being built may be lost: a person clicks again
            self.page.click("#send")
        return self.answers(before)

    def click(self, place: str, then: Locator) -> None:
        """Click, and wait for what comes of it; a click on what is being drawn anew may be lost, and is repeated."""
        self.page.click(place)
        try:
            then.wait_for(timeout=LOST)
        except Exception:
            self.page.click(place)
            then.wait_for()

    def answers(self, turn: int) -> tuple[Locator, Locator]:
        """Both answers of a turn, once they are whole."""
        sides = self.page.locator("#conversation .nr-sides").nth(turn).locator("article")
        for side in (0, 1):
            try:
                self.page.wait_for_function(
                    "([turn, side]) => { const reply = document.querySelectorAll('#conversation .nr-sides')[turn]"
                    "?.querySelectorAll('article')[side]; return reply && reply.dataset.state !== 'running' "
                    "&& (reply.dataset.state !== 'done' || reply.querySelector('.nr-badge')); }",
                    arg=[turn, side],
                )
            except Exception as error:
                shown = self.page.locator("#conversation").inner_html()
                raise AssertionError(f"side {side} of turn {turn}: {shown[:2000]}, {self.complaints}") from error
        return sides.nth(0), sides.nth(1)

    def picture(self, name: str) -> Path:
        """Keep a screenshot of the whole page."""
        path = self.folder / f"{name}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.complaints.append(f"left this machine: {request.url}")

    def _failed(self, request: Any) -> None:
        if "/queue/data" not in request.url:  # the page itself ends these streams when it has what it asked for
            self.complaints.append(f"failed: {request.url} ({request.failure})")

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")


@contextmanager
def tab(
    browser: Browser, folder: Path, *, width: int = 1280, height: int = 900, scheme: Any = "light"
) -> Iterator[Tab]:
    """A page in a profile of its own; at its end there must be no complaints."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        made = Tab(context.new_page(), folder)
        made.watch()
        yield made
        assert not made.complaints, made.complaints
    finally:
        context.close()


# Text whose contrast with what lies behind it is below WCAG 2.2's AA: 4.5, and 3 where it is large.
FAINT = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = (v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
  const lum = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const behind = (element) => { const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.textContent.trim() || ['SCRIPT', 'STYLE', 'TITLE'].includes(element.tagName)) continue;
    if (element.closest('svg')) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(element), back = behind(element);
    const a = lum(over(parse(style.color), back)), b = lum(back);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push([node.textContent.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return found;
}"""

# Things one can operate that a screen reader could not name.
NAMELESS = """() => [...document.querySelectorAll(
  'button, input, textarea, [role=tab], summary, [role=region], [role=img], img')]
  .filter((e) => e.checkVisibility() && !(e.innerText || e.getAttribute('aria-label') || e.labels?.length || e.alt))
  .map((e) => e.outerHTML.slice(0, 160))"""

# Cells of tables whose text runs into the next one.
SPILLED = """() => [...document.querySelectorAll('.nr th, .nr td')]
  .filter((cell) => cell.checkVisibility() && cell.scrollWidth > cell.clientWidth + 1)
  .map((cell) => cell.innerText.slice(0, 80))"""

# Sizes of what text there is, but for headings.
SIZES = """() => { const found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.textContent.trim() || ['SCRIPT', 'STYLE', 'TITLE', 'H1', 'H2'].includes(element.tagName)) continue;
    if (element.checkVisibility() && element.tagName !== 'title') found.add(getComputedStyle(element).fontSize);
  }
  return [...found]; }"""

# What axe-core finds that is serious or worse.
VIOLATIONS = """async () => (await axe.run(document)).violations
  .filter((found) => ['serious', 'critical'].includes(found.impact))
  .map((found) => [found.id, found.help, ...found.nodes.slice(0, 3).map((node) => node.html.slice(0, 120))])"""


def axe_source() -> str:
    """axe-core's script: of the file in $NEST_AXE, else of axe-playwright-python; empty where there is neither."""
    from importlib.util import find_spec

    place = os.environ.get("NEST_AXE", "")
    found = find_spec("axe_playwright_python")
    if not place and found is not None and found.origin is not None:
        place = str(Path(found.origin).with_name("axe.min.js"))
    return Path(place).read_text(encoding="utf-8") if place else ""

"""A headless Chromium that opens pages as people do and tells what became of them, over its DevTools protocol."""

import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0",
)  # fmt: skip
PATIENCE = 60  # seconds


def installed_browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """What the page that is open logs, throws or cannot load is in `troubles`, whatever it asks for in `requests`."""

    def __init__(self, socket: ClientConnection):
        self._socket, self._numbers, self._session = socket, itertools.count(), {}
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self._is_loaded = False
        [target] = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """The result of a command. Raises RuntimeError with what the browser says against it."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters} | self._session))
        while (message := self._next()).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def _next(self) -> dict:
        message = json.loads(self._socket.recv(timeout=PATIENCE))
        said = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Network.loadingFailed" if not said.get("canceled"):
                self.troubles.append(f"not loaded: {said['errorText']}")
            case "Runtime.exceptionThrown":
                self.troubles.append(f"exception: {said['exceptionDetails']}")
            case "Runtime.consoleAPICalled":
                self.troubles.append(f"console: {said['args']}")
            case "Log.entryAdded":
                self.troubles.append(f"{said['entry']['level']}: {said['entry']['text']} {said['entry'].get('url')}")
        return message

    def open(self, page: Path) -> float:
        """Seconds until the page is there with all that it loads at once."""
        self.troubles, self.requests, self._is_loaded = [], [], False
        began = time.monotonic()
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.wait_until_loaded()
        return time.monotonic() - began

    def wait_until_loaded(self) -> None:
        """For `open`, and for a page that a link of the one before has led to."""
        while not self._is_loaded:
            self._next()
        self._is_loaded = False

    def ask(self, expression: str):
        """What a JavaScript expression is, or what its promise becomes. Raises RuntimeError for what it throws."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def show(self, width: int, height: int) -> None:
        """In CSS pixels; what is as narrow as a phone is one."""
        is_phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if is_phone else 1,
            mobile=is_phone,
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """light or dark"""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@contextlib.contextmanager
def tab_of(program: str, profile: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, whose fresh profile is made in the folder. The browser ends with the block."""
    profile.mkdir(parents=True)
    with (profile / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdin=subprocess.DEVNULL, stdout=said,
            stderr=said,
        )  # fmt: skip
    try:
        with connect(address_of(process, profile), max_size=None, compression=None, proxy=None) as socket:
            yield Tab(socket)
            with contextlib.suppress(Exception):
                socket.send(json.dumps({"id": -1, "method": "Browser.close"}))
                process.wait(10)
    finally:
        process.kill()
        process.wait()


def address_of(process: subprocess.Popen, profile: Path) -> str:
    """Where the browser listens: it writes that down once it does."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            port, path, *_ = [*(profile / "DevToolsActivePort").read_text().split("\n"), ""]
            if path:
                return f"ws://127.0.0.1:{port}{path}"
        time.sleep(0.05)
    raise RuntimeError(f"the browser did not start: {(profile / 'said.txt').read_text(errors='replace')[-1000:]}")


# ------------------------------------------------------------------------------------------- what a page must not have

WIDER = """
[...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  if (!box.width || box.right <= screen.width + .5 && box.left >= -.5) return false;
  for (let above = element.parentElement; above; above = above.parentElement)
    if (getComputedStyle(above).overflowX == "auto" && above.getBoundingClientRect().right <= screen.width + .5)
      return false;
  return true;
}).map(element => element.outerHTML.slice(0, 120))
"""
# WCAG 2, 1.4.3: the relative luminance of sRGB colours. Nothing on our pages is half transparent.
FAINT = """
(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = share => share <= .04045 ? share / 12.92 : ((share + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    throw "the page has no background";
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility()) continue;
    seen += 1;
    const pair = [luminance(numbers(getComputedStyle(element).color)), luminance(behind(element))];
    const contrast = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
    if (contrast < LEAST) found.push(`${contrast.toFixed(1)}: ${text.slice(0, 60)}`);
  }
  return [seen, found];
})()
"""
SCROLLED = """
(async () => {
  for (let y = 0; y < document.documentElement.scrollHeight; y += innerHeight / 2) {
    scrollTo(0, y);
    await new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve, 20)));
  }
  const unloaded = () => [...document.images].filter(one => !one.complete);
  for (let waited = 0; waited < 5000 && unloaded().length; waited += 50)
    await new Promise(resolve => setTimeout(resolve, 50));
  return [...document.images].filter(one => !one.naturalWidth).map(one => one.outerHTML);
})()
"""
PLAYED = """
(async () => {
  const played = [];
  for (const video of document.querySelectorAll("video")) {
    video.scrollIntoView();  // what is not on the screen may wait with its loading
    video.play().catch(() => {});
    for (let waited = 0; waited < PATIENCE && video.currentTime == 0 && !video.error; waited += 20)
      await new Promise(resolve => setTimeout(resolve, 20));
    video.pause();
    played.push([video.getAttribute("src"), video.currentTime, video.videoWidth, video.videoHeight]);
  }
  return played;
})()
"""


def too_wide(tab: Tab) -> list[str]:
    """What sticks out of the screen, but for what scrolls within a box of its own."""
    return tab.ask(WIDER) + tab.ask("document.documentElement.scrollWidth > screen.width ? ['the whole page'] : []")


def faint_text(tab: Tab, least: float = 4.5) -> list[str]:
    """The texts with less contrast than WCAG's level AA wants of small letters."""
    seen, found = tab.ask(FAINT.replace("LEAST", str(least)))
    assert seen > 10
    return found


def broken_pictures(tab: Tab) -> list[str]:
    """Scrolls from top to bottom, as a reader who waits for the pictures."""
    return tab.ask(SCROLLED)


def play_all_videos(tab: Tab, patience: float = 20) -> dict[str, tuple[int, int]]:
    """Width and height of each video by its address, in pixels. Each of them is played for a moment."""
    played = tab.ask(PLAYED.replace("PATIENCE", str(1000 * patience)))
    stuck = [source for source, second, *_ in played if second == 0]
    assert not stuck, f"do not play: {stuck}"
    return {source: (width, height) for source, _, width, height in played}

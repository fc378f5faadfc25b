"""Open every page of a built site in Chromium, offline, and say what is wrong with it.

python site/browser.py outputs/site/learners                 a line per fault, exit status 1 if there are any
python site/browser.py FOLDER index api/index --shots OUT    pictures of some pages, light and dark
"""

import argparse
import base64
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-quic", "--disable-sync"]
FLAGS += ["--no-first-run", "--hide-scrollbars"]
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"

# What is asked of each page once it is loaded; a list of faults.
FAULTS = r"""(async () => {
  const faults = [];
  if (window.MathJax) {
    if (!MathJax.startup || !MathJax.startup.promise) faults.push("MathJax did not start");
    else await MathJax.startup.promise;
  }
  for (const img of document.images) {
    img.loading = "eager";
    try { await img.decode(); } catch { faults.push("broken image " + img.src); }
    if (!img.alt.trim() || img.alt === img.getAttribute("src")) faults.push("image without alt text " + img.src);
  }
  for (const math of document.querySelectorAll(".math"))
    if (!math.querySelector("mjx-container")) faults.push("formula not rendered: " + math.textContent.slice(0, 80));
  for (const wrong of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    faults.push("formula with an error: " + (wrong.dataset.mjxError || wrong.textContent).slice(0, 80));
  const walker = document.createTreeWalker(document.querySelector("article") || document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());)
    if (!node.parentElement.closest("pre, code, script, style, mjx-container, dt.sig") &&
        /\\[(\[]|\$\$|\\(frac|epsilon|sigma|nabla|bar|mathcal|text)\b|\$[^$\s][^$]*\$/.test(node.textContent))
      faults.push("raw formula: " + node.textContent.trim().slice(0, 80));
  if (!document.querySelector("h1")) faults.push("no title");
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth + 1)
    faults.push("the page is wider than the window, " + document.documentElement.scrollWidth + " px");
  return faults;
})()"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


class Browser:
    """One tab of a headless Chromium that reaches this machine only, spoken to by its debugging protocol."""

    def __init__(self, program: str):
        from websocket import create_connection

        self.profile = tempfile.mkdtemp(prefix="chromium-")
        call = [program, *FLAGS, OFFLINE, "--remote-debugging-port=0", f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self._port()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
            tab = next(one for one in json.load(answer) if one["type"] == "page")
        self.socket = create_connection(tab["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _port(self) -> str:
        file, end = Path(self.profile) / "DevToolsActivePort", time.monotonic() + 120
        while time.monotonic() < end:
            if file.exists() and (lines := file.read_text().split()):
                return lines[0]
            time.sleep(0.05)
        raise TimeoutError("Chromium did not start in two minutes")

    def call(self, method: str, **parameters: object) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def open(self, address: str) -> list[dict]:
        """Go there and wait until all is loaded; the events on the way."""
        self.events.clear()
        failed = self.call("Page.navigate", url=address).get("errorText")
        if failed:
            raise RuntimeError(f"{address}: {failed}")
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))
        return self.events

    def value(self, script: str) -> object:
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            raise RuntimeError(str(got["exceptionDetails"]))
        return got["result"].get("value")

    def look(self, *, width: int, height: int, dark: bool = False) -> None:
        """The window's size, and what the reader's system prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        shutil.rmtree(self.profile, ignore_errors=True)


def complaints(events: list[dict], here: str) -> Iterator[str]:
    """What the browser reported while a page was open."""
    for event in events:
        kind, told = event["method"], event["params"]
        if kind == "Runtime.exceptionThrown":
            yield f"script error: {told['exceptionDetails'].get('exception', told['exceptionDetails'])}"[:200]
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            yield f"console {told['type']}: " + " ".join(str(a.get("value", a)) for a in told["args"])[:200]
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            yield f"log: {told['entry']['text']} {told['entry'].get('url', '')}"
        elif kind == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if not address.startswith((here, "data:", "blob:")):
                yield f"asks another server: {address}"


class Served:
    """A folder on 127.0.0.1, and a browser to read it with."""

    def __init__(self, folder: Path, program: str | None = None):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.home = f"http://127.0.0.1:{self.server.server_port}/"
        self.browser = Browser(program or shutil.which("chromium") or "chromium-browser")

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.close()
        self.server.shutdown()
        self.server.server_close()

    def faults(self, page: str) -> list[str]:
        """What is wrong with a page, as a reader sees it at a desk; then whether it fits a telephone."""
        self.browser.look(width=1280, height=900)
        self.browser.open(self.home + page)
        found = self.browser.value(FAULTS)
        found += complaints(self.browser.events, self.home)
        self.browser.look(width=390, height=800)
        wide = self.browser.value("document.documentElement.scrollWidth")
        return found + ([f"on a telephone the page is {wide} px wide, of 390"] if wide > 391 else [])


class Links(HTMLParser):
    """The links of a page, and the places in it that a link may lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        key = {"a": "href", "link": "href", "img": "src", "script": "src"}.get(tag)
        if key and found.get(key):
            self.links.append(found[key])


def dead_links(folder: Path) -> list[str]:
    """Links between pages that lead to no file, or to no place in it. Other sites are not asked."""
    pages = {file.relative_to(folder).as_posix(): Links(file.read_text("utf-8")) for file in folder.rglob("*.html")}
    dead = []
    for name, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme:
                continue
            address, place = urldefrag(urljoin(f"//site/{name}", link))
            path = unquote(urlsplit(address).path).lstrip("/")
            target = path + "index.html" if path.endswith("/") or not path else path
            if not (folder / target).is_file():
                dead.append(f"{name}: no file {link}")
            elif place and target in pages and unquote(place) not in pages[target].places:
                dead.append(f"{name}: no place {link}")
    return dead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*", help="with --shots: names without .html")
    parser.add_argument("--shots", type=Path, help="a folder for pictures")
    parser.add_argument("--top", default="0", help="with --shots: scroll there first, in pixels or to #a-place")
    chosen = parser.parse_args()
    with Served(chosen.folder) as site:
        if chosen.shots:
            chosen.shots.mkdir(parents=True, exist_ok=True)
            for page, dark in itertools.product(chosen.pages, (False, True)):
                site.browser.look(width=1400, height=1000, dark=dark)
                site.browser.open(f"{site.home}{page}.html")
                site.browser.value(FAULTS)
                go = f"document.querySelector('{chosen.top}').scrollIntoView()"
                site.browser.value(go if chosen.top.startswith("#") else f"window.scrollTo(0, {int(chosen.top)})")
                time.sleep(0.3)
                site.browser.picture(chosen.shots / f"{page.replace('/', '-')}-{'dark' if dark else 'light'}.png")
            return 0
        names = sorted(file.relative_to(chosen.folder).as_posix() for file in chosen.folder.rglob("*.html"))
        faults = 0
        for fault in itertools.chain(
            (f"{n}: {fault}" for n in names for fault in site.faults(n)), dead_links(chosen.folder)
        ):
            print(fault, flush=True)
            faults += 1
    print(f"{len(names)} pages, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

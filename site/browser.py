"""Open every page of a built site in Chromium, offline, and say what is wrong with it.

python site/browser.py outputs/site/learners                 a line per fault, exit status 1 if there are any
python site/browser.py FOLDER index api/index --shots OUT    pictures of some pages, light and dark
"""

import argparse
import itertools
import sys
import threading
from contextlib import ExitStack
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from chromium import chromium_page, complaints

DESK, TELEPHONE = dict(width=1280, height=900), dict(width=390, height=800)
PICTURES = dict(width=1400, height=1000)

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


class Served:
    """A folder on 127.0.0.1, and a page of a browser to read it with."""

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        self.home = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> "Served":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._stack.callback(self._server.server_close)
        self._stack.callback(self._server.shutdown)
        self.page = self._stack.enter_context(chromium_page())
        self._told = complaints(self.page, ("error", "warning", "assert"))
        self.page.on("request", lambda request: self._asked(request.url))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _asked(self, address: str) -> None:
        if not address.startswith((self.home, "data:", "blob:")):
            self._told.append(f"asks another server: {address}")

    def faults(self, name: str) -> list[str]:
        """What is wrong with a page, as a reader sees it at a desk; then whether it fits a telephone."""
        self.page.set_viewport_size(DESK)
        self._told.clear()
        self.page.goto(self.home + name)
        found = self.page.evaluate(FAULTS) + self._told
        self.page.set_viewport_size(TELEPHONE)
        wide = self.page.evaluate("document.documentElement.scrollWidth")
        return found + ([f"on a telephone the page is {wide} px wide, of 390"] if wide > 391 else [])

    def picture(self, name: str, file: Path, *, top: str = "0", dark: bool = False) -> None:
        """Of the part of a page below `top`: pixels, or #a-place."""
        self.page.set_viewport_size(PICTURES)
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.goto(self.home + name)
        self.page.evaluate(FAULTS)  # it waits for formulas and pictures
        go = f"document.querySelector('{top}').scrollIntoView()" if top.startswith("#") else f"scrollTo(0, {int(top)})"
        self.page.evaluate(go)
        self.page.screenshot(path=file, animations="disabled")


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
            for name, look in itertools.product(chosen.pages, ("light", "dark")):
                file = chosen.shots / f"{name.replace('/', '-')}-{look}.png"
                site.picture(f"{name}.html", file, top=chosen.top, dark=look == "dark")
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

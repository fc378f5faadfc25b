"""Every interactive figure in JupyterLab, in a real browser: keys and mouse move the slider, and the picture follows.

Each lesson's solution is cut down to its slider and the cells that this needs. Screenshots go to outputs/browser, and
benchmarks/browser.py measures the times from an event to the new picture.
"""

import ast
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Dialog, Page

from chromium import CHROMIUM, chromium_page, complaints
from condiff_check.registry import find
from lesson import bound_names, build, parsed

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "outputs" / "browser"
WIDGET_CELL = "slider("
LESSONS = sorted(path.stem for path in (ROOT / "lessons").glob("*.py") if f"\n{WIDGET_CELL}" in path.read_text("utf-8"))

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.timeout(900),
]


def is_slider(cell) -> bool:
    return cell.cell_type == "code" and any(line.startswith(WIDGET_CELL) for line in cell.source.splitlines())


def only_the_slider(lesson: str):
    """The lesson's solution up to its slider, with only those cells that bind a name which is in use further down."""
    notebook = build((ROOT / f"lessons/{lesson}.py").read_text("utf-8"), lesson, find).solution
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and not cell.id.endswith("-check")]
    last = next(i for i, cell in enumerate(code) if is_slider(cell))
    kept, needed = [], set()
    for i in range(last, -1, -1):
        tree = parsed(code[i])
        filled = {
            node.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
        }
        if i == last or code[i].id.endswith("-setup") or needed & (bound_names(tree) | filled):
            kept.append(code[i])
            needed |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    cells = [nbformat.v4.new_code_cell(cell.source, id=cell.id) for cell in reversed(kept)]
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def test_lessons_00_to_09_have_one_slider_each():
    assert [lesson[:2] for lesson in LESSONS][:10] == [f"{n:02}" for n in range(10)]
    for lesson in LESSONS:
        text = (ROOT / f"lessons/{lesson}.py").read_text("utf-8")
        assert text.count(f"\n{WIDGET_CELL}") == 1, lesson


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A server on folder/notebooks; its address, with {} for a page."""
    notebooks, token = folder / "notebooks", secrets.token_hex(8)
    notebooks.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"CONDIFF_BUDGET": "smoke"}
    environment |= {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "RUNTIME", "DATA")}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
    for name in ("MPLBACKEND", "CONDIFF_STATIC"):
        environment.pop(name, None)
    settings = {
        "notebook-extension/tracker": '{"windowingMode": "none"}',  # cells out of view are there too
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }
    for name, text in settings.items():
        file = folder / f"SETTINGS/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    words = ["-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    words += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--LabApp.news_url="]
    words += [f"--ServerApp.root_dir={notebooks}", "--LabApp.expose_app_in_browser=True"]
    words += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    address = f"http://127.0.0.1:{port}/{{}}?token={token}&reset"
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
        try:
            _answered(address.format("api"))
            yield address
        finally:
            server.terminate()
            server.wait(30)


def _answered(address: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


class Lab:
    """JupyterLab in a page."""

    def __init__(self, page: Page, folder: Path, address: str):
        self.page, self.folder, self.address = page, folder / "notebooks", address
        self.errors = complaints(page)
        page.on("dialog", self._accept)

    def _accept(self, dialog: Dialog) -> None:
        if dialog.type != "beforeunload":  # "Leave site?" over a notebook that was not saved
            self.errors.append(f"a dialog: {dialog.message}")
        dialog.accept()

    def wait(self, script: str) -> None:
        self.page.wait_for_function(script, polling=50)

    def run(self, notebook, name: str) -> None:
        """Open the notebook, run its cells, wait for the slider's picture."""
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        self.errors.clear()
        self.page.goto(self.address.format(f"doc/tree/{name}.ipynb"))
        self.wait(f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'")
        self.wait("document.querySelectorAll('.jp-CodeCell').length > 1")
        self.page.evaluate(f"window.jupyterapp.shell.activateById({PANEL}.id)")
        self.wait(f"window.jupyterapp.shell.currentWidget === {PANEL}")
        self.page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.wait(f"!!document.querySelector('{PICTURE}')")
        self.wait(f"!{STARS}")  # all pictures are drawn; the kernel calls itself idle earlier, for the widget's sake
        self.page.evaluate(WATCH)

    def by_key(self, name: str) -> tuple[dict, float]:
        return self.after(lambda: self.page.keyboard.press(name))

    def place(self) -> float:
        """Where the handle is: 0 at the left end of its track, 1 at the right."""
        at = self.page.evaluate(HANDLE)
        return (at["x"] - at["left"]) / at["width"]

    def by_mouse(self, share: float) -> tuple[dict, float]:
        """Drag the handle to that share of its track."""
        at, mouse = self.page.evaluate(HANDLE), self.page.mouse
        mouse.move(at["x"], at["y"])
        mouse.down()
        mouse.move(at["left"] + share * at["width"], at["y"], steps=5)
        return self.after(mouse.up)

    def leave(self) -> None:
        """End the notebook's kernel: ten of them would not fit into a small memory."""
        self.page.evaluate(f"{PANEL}.sessionContext.shutdown().then(() => true)")

    def shown(self) -> dict:
        return self.page.evaluate(
            f"(() => {{const e = document.querySelector('{PICTURE}'); return {{alt: e.alt, src: e.src, width: e.width,"
            " natural: e.naturalWidth, readout: document.querySelector('.widget-readout').innerText}})()"
        )

    def after(self, act) -> tuple[dict, float]:
        """What is shown once the act has changed the picture, and the milliseconds from its event to that."""
        before = self.shown()["src"]
        self.page.evaluate("window.drawn = null")
        act()
        self.wait("window.drawn")
        milliseconds, found = self.page.evaluate("window.drawn"), self.shown()
        assert found["src"] != before
        return found, milliseconds


PANEL = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])][0]"
PICTURE = ".jp-OutputArea .jupyter-widgets figure img"
STARS = "[...document.querySelectorAll('.jp-InputArea-prompt')].some(prompt => prompt.innerText.includes('*'))"
# From the last key or button to the new picture, decoded: both times are taken in the page.
WATCH = f"""(() => {{
    let begun = 0, last = document.querySelector("{PICTURE}").src;
    for (const kind of ["keydown", "mouseup", "pointerup"])
        document.addEventListener(kind, () => {{ begun = performance.now(); }}, true);
    new MutationObserver(async () => {{
        const from = begun, picture = document.querySelector("{PICTURE}");
        if (!picture || picture.src === last) return;  // the slider's own number
        last = picture.src;
        await picture.decode();
        window.drawn = window.drawn || performance.now() - from;
    }}).observe(document.querySelector("{PICTURE}").closest(".widget-vbox"), {{childList: true, subtree: true}});
    document.querySelector("{PICTURE}").scrollIntoView({{block: "center"}});
}})()"""
HANDLE = """(() => {
    const [handle, track] = [".noUi-handle", ".noUi-base"].map(e => document.querySelector(e).getBoundingClientRect());
    return {x: handle.x + handle.width / 2, y: handle.y + handle.height / 2, left: track.left, width: track.width};
})()"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with jupyterlab(folder) as address, chromium_page() as page:
        yield Lab(page, folder, address)


def test_what_a_page_complains_of_is_heard():
    with chromium_page() as page:
        lab = Lab(page, Path(), "")
        page.evaluate("alert('oh')")
        page.evaluate("console.error('ah'), console.log('fine')")
        page.evaluate("new Promise(go => setTimeout(go, 50, setTimeout(() => { throw new Error('uh') })))")
        assert lab.errors == ["a dialog: oh", "console error: ah", "script error: uh"]


@pytest.mark.parametrize(
    "lesson", [pytest.param(one, marks=[] if one == "08_dit" else pytest.mark.slow) for one in LESSONS]
)
def test_keys_and_mouse_move_the_slider_and_the_picture_follows(lesson, lab):
    page = lab.page
    lab.run(only_the_slider(lesson), lesson)
    first = lab.shown()
    assert len(first["alt"].split()) > 5
    assert first["width"] == first["natural"], "shrunk at the width of a laptop"

    assert page.evaluate("document.querySelector('.noUi-handle').tabIndex") == 0
    page.evaluate("document.querySelector('.noUi-handle').focus()")
    left, by_key = lab.by_key("ArrowLeft")
    right, by_key_back = lab.by_key("ArrowRight")
    assert right == first
    assert left["readout"] != first["readout"]
    assert left["alt"] != first["alt"]

    place = lab.place()
    end, by_mouse = lab.by_mouse(0 if place > 0.6 else 1)  # from the middle of three, the left end was shown already
    assert len({left["src"], right["src"], end["src"]}) == 3
    back, by_mouse_back = lab.by_mouse(place)
    assert back == first
    best = min(by_key, by_key_back, by_mouse, by_mouse_back)  # this machine may be busy: benchmarks/browser.md has more
    assert best < 100

    for theme in ("Dark", "Light"):
        page.evaluate(
            f"void window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})"
        )
        lab.wait(f"document.body.dataset.jpThemeLight === '{str(theme == 'Light').lower()}'")
        lab.wait("document.querySelector('.jp-SplashScreen, #jupyterlab-splash') === null")
        page.screenshot(path=SHOTS / f"{lesson}-{theme.lower()}.png")
    lab.leave()
    assert lab.errors == []

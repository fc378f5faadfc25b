"""A page in a headless Chromium, the system's own, by Playwright: real keys, a real mouse, and all complaints."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # it reaches this machine only
FLAGS = ("--disable-dev-shm-usage", "--disable-gpu", "--disable-quic", "--no-sandbox", OFFLINE)


@contextmanager
def chromium_page(width: int = 1366, height: int = 768, *, patience: float = 200) -> Iterator[Page]:
    """One page, by default of a laptop's size, that waits for so many seconds: where two cores have other work,
    JupyterLab's first page takes minutes. Raises RuntimeError where there is no Chromium."""
    if CHROMIUM is None:
        raise RuntimeError("there is no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=1000 * patience)
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(1000 * patience)
        yield page
        browser.close()


def complaints(page: Page, kinds: tuple[str, ...] = ("error", "assert")) -> list[str]:
    """Grows by what scripts raise, and by what the console says of those kinds, from now on."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))
    page.on("console", lambda said: found.append(f"console {said.type}: {said.text}") if said.type in kinds else None)
    return found

"""How soon a slider answers: in JupyterLab and a headless Chromium, by real keys and a real mouse. Writes browser.md.

python benchmarks/browser.py [--moves N]

From the event to the new picture, decoded, both times taken in the page: widget, kernel and back, and the browser.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from rows import table, write

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]

from chromium import chromium_page  # noqa: E402
from test_browser import LESSONS, Lab, jupyterlab, only_the_slider  # noqa: E402

LIMIT = 100.0  # milliseconds, within which an answer feels immediate (Nielsen 1993)


def moves(lab: Lab, n: int) -> dict[str, list[float]]:
    """Milliseconds of the very first move, of n further ones by key, to places seen before, and of n by mouse."""
    lab.page.evaluate("document.querySelector('.noUi-handle').focus()")
    first = lab.by_key("ArrowLeft")[1]
    keys = [lab.by_key(name)[1] for _ in range(n // 2) for name in ("ArrowRight", "ArrowLeft")]
    ends = (0, 1) if lab.place() > 0.5 else (1, 0)
    mouse = [lab.by_mouse(share)[1] for _ in range(n // 2) for share in ends]
    return {"first": [first], "keys": keys, "mouse": mouse}


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.0f} ({max(times):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=20)
    n, rows, late = parser.parse_args().moves, [], 0
    with (
        tempfile.TemporaryDirectory() as folder,
        jupyterlab(Path(folder)) as address,
        chromium_page() as page,
    ):
        lab = Lab(page, Path(folder), address)
        for lesson in LESSONS:
            lab.run(only_the_slider(lesson), lesson)
            seen, times = lab.shown(), moves(lab, n)
            picture = f"{seen['natural']} pixels, {len(seen['src']) * 3 // 4 // 1024} KB"
            rows.append([lesson, picture, f"{times['first'][0]:.0f}", spread(times["keys"]), spread(times["mouse"])])
            late += sum(value > LIMIT for value in times["keys"] + times["mouse"])
            print(json.dumps([lesson, times]), flush=True)
            lab.leave()
    about = f"Chromium, headless, 1366x768; {n} moves by key and {n} by mouse in each lesson; the kernel has 1 thread. "
    about += f"Other work on the machine: load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores."
    columns = ["lesson", "picture", "first move, ms", "by key, ms: median (worst)", "by mouse, ms: median (worst)"]
    told = f"Of {2 * n * len(rows)} moves after the first, {late} took longer than {LIMIT:.0f} ms.\n"
    write(__file__, "How soon the sliders answer", about, table(columns, rows), told)


if __name__ == "__main__":
    main()

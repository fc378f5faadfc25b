"""Run notebooks under nbval, one after another, and say for each: cells passed, seconds, megabytes.

python tools/run.py solutions/*.ipynb                 every cell runs; cells tagged nbval-check-output say the same
python tools/run.py solutions/*.ipynb --tier smoke    with CONDIFF_BUDGET=smoke: fewer steps, the same cells
python tools/run.py solutions/*.ipynb --record        and note the seconds in lessons/minutes.json
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

try:
    import nbval  # noqa: F401
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed. What the notebooks are run with comes with: pip install -e '.[test]'")

TOOLS = Path(__file__).resolve().parent
NBVAL = [
    "--nbval-lax",
    "--nbval-current-env",
    "--nbval-cell-timeout=600",
    f"--nbval-sanitize-with={TOOLS / 'sanitize.cfg'}",
]
# Not the project's pytest options: their import hook checks shapes in condiff_ref, and learners do not have it.
PLAIN = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:timeout", "--color=no"]


class Tier(StrEnum):
    smoke = "smoke"
    full = "full"


@dataclass(frozen=True)
class Result:
    """What came out of one notebook. `report` is what nbval says of the cells that failed."""

    notebook: str
    cells: int
    passed: int
    failed: int
    seconds: float
    megabytes: float
    report: str = ""

    @property
    def good(self) -> bool:
        return self.failed == 0 and self.passed > 0


def main(
    notebooks: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    tier: Annotated[Tier | None, typer.Option(help="sets CONDIFF_BUDGET; as it is if not given")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table there, too")] = None,
    record: Annotated[bool, typer.Option("--record", help="note the seconds in lessons/minutes.json")] = False,
) -> None:
    """Run notebooks under nbval; exit with 1 if a cell fails."""
    if tier:
        os.environ["CONDIFF_BUDGET"] = tier
    results = []
    for notebook in notebooks:
        print(f"{notebook} ...", file=sys.stderr, flush=True)
        results.append(run(notebook))
    for result in results:
        print(result.report, end="")
    Console().print(_table(results))
    if json_file:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    good = all(result.good for result in results)
    if record and good:
        _record(notebooks, results)
    raise typer.Exit(not good)


def run(notebook: Path) -> Result:
    """The notebook in a kernel of its own, started in the notebook's folder, as Jupyter does it."""
    notebook = notebook.resolve()
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PYTEST_ADDOPTS", "PYTEST_PLUGINS")}
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "report.xml")
        words = [*PLAIN, *NBVAL, f"--rootdir={notebook.parent}", f"--junitxml={xml}", str(notebook)]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "pytest", *words], env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        counts = _counts(xml)
    failed = counts["failures"] + counts["errors"] + (done.returncode != 0 and not counts["failures"])
    return Result(
        notebook=notebook.name,
        cells=counts["tests"],
        passed=counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        failed=failed,
        seconds=round(seconds, 1),
        megabytes=round(notebook.stat().st_size / 1e6, 3),
        report=done.stdout + done.stderr if done.returncode else "",
    )


def _counts(xml: Path) -> dict[str, int]:
    names = ("tests", "failures", "errors", "skipped")
    if not xml.exists():
        return dict.fromkeys(names, 0)
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    return {name: int(suite.get(name)) for name in names}


def _table(results: list[Result]) -> Table:
    table = Table("notebook")
    for header in ("cells", "passed", "failed", "seconds", "MB"):
        table.add_column(header, justify="right")
    for r in results:
        style = None if r.good else "red"
        numbers = f"{r.cells}", f"{r.passed}", f"{r.failed}", f"{r.seconds:.1f}", f"{r.megabytes:.2f}"
        table.add_row(r.notebook, *numbers, style=style)
    total = sum(r.seconds for r in results), sum(r.megabytes for r in results)
    table.add_section()
    table.add_row(f"{len(results)} notebooks", "", "", "", f"{total[0]:.1f}", f"{total[1]:.2f}")
    return table


def _record(notebooks: list[Path], results: list[Result]) -> None:
    """Times of one machine stand together: an entry from another machine is begun anew."""
    tier = os.environ.get("CONDIFF_BUDGET") or "full"
    for notebook, result in zip(notebooks, results, strict=True):
        file = notebook.resolve().parents[1] / "lessons" / "minutes.json"
        minutes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        entry = minutes.get(notebook.stem, {})
        entry = entry if entry.get("machine") == machine() else {}
        minutes[notebook.stem] = entry | {tier: round(result.seconds), "machine": machine()}
        file.write_text(json.dumps(minutes, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("noted in lessons/minutes.json; make notebooks puts it under the titles")


def machine() -> str:
    """In words: what a reader compares a time with."""
    if Path("/proc/driver/nvidia").exists():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


if __name__ == "__main__":
    typer.run(main)

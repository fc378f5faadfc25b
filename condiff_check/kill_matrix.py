"""Try every mistake on file, and every right answer written another way, and write down what the check makes of them.

python -m condiff_check.kill_matrix FILE [--repeats N] [--kept JSON]

Rows are kept as they come, by the code that they are of: a run that was cut off goes on, and one after a change
measures again what has changed.
"""

import argparse
import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import condiff_ref
from condiff_ref.checkpoints import machine

from .checking import examine
from .exercise import Exercise, Mistake
from .registry import exercises, find
from .report import RIGHT, WRONG, Report


@dataclass(frozen=True)
class Row:
    """What came of one answer in so many checks with fresh inputs. `name` is empty for a right answer."""

    exercise: str
    name: str
    checks: int
    as_due: int  # refused, or accepted if it is right
    named: int  # diagnosed as itself; as_due if it is right
    seconds: float

    @property
    def hole(self) -> bool:
        """Whether a single check came out wrong."""
        return min(self.as_due, self.named) < self.checks


def rows(exercise: Exercise, seeds: Sequence[int]) -> list[Row]:
    """One row for each right answer on file, the reference first, and for each mistake."""
    right = (written_again(exercise.references), *exercise.alternatives)
    accepted = [_right(exercise, answers, seeds) for answers in right]
    return accepted + [_wrong(exercise, mistake, seeds) for mistake in exercise.mistakes]


def written_again(functions: Sequence[Callable]) -> tuple[Callable, ...]:
    """The references as a solution notebook has them: the same source, run anew."""
    again = []
    for function in functions:
        names = dict(vars(sys.modules[function.__module__]))
        exec(compile(inspect.getsource(function), f"<{function.__name__}>", "exec"), names)
        again.append(names[function.__name__])
    return tuple(again)


def _right(exercise: Exercise, answers: Sequence[object], seeds: Sequence[int]) -> Row:
    reports, seconds = _reports(exercise, answers, seeds)
    accepted = sum(report.status == RIGHT for report in reports)
    return Row(exercise.id, "", len(seeds), accepted, accepted, seconds)


def _wrong(exercise: Exercise, mistake: Mistake, seeds: Sequence[int]) -> Row:
    reports, seconds = _reports(exercise, mistake.answers, seeds)
    refused = [report for report in reports if report.status == WRONG]
    named = sum(report.diagnosis == mistake.diagnosis for report in refused)
    return Row(exercise.id, mistake.name, len(seeds), len(refused), named, seconds)


def _reports(exercise: Exercise, answers: Sequence[object], seeds: Sequence[int]) -> tuple[list[Report], float]:
    reports, seconds = [], []
    for seed in seeds:
        start = time.perf_counter()
        reports.append(examine(exercise, answers, seed=seed))
        seconds.append(time.perf_counter() - start)
    return reports, median(seconds)


def table(found: Sequence[Row], repeats: int) -> str:
    """The rows as Markdown: a summary, one line per exercise, then one line per mistake."""
    wrong, right = [row for row in found if row.name], [row for row in found if not row.name]
    refused, named = (_share(sum(getattr(row, what) for row in wrong), wrong) for what in ("as_due", "named"))
    accepted = _share(sum(row.as_due for row in right), right)
    lines = [
        "# Kill matrix",
        "",
        "Every mistake on file against its check: is it refused, and diagnosed as itself? And every right answer on",
        f"file, the reference and others written differently: is it accepted? Each {repeats} times with fresh inputs.",
        "",
        f"`make kill-matrix`, {machine()}, {datetime.now(UTC):%Y-%m-%d}.",
        "",
        f"{len(wrong)} mistakes: {refused} of checks refused, {named} diagnosed as the mistake that it is. "
        f"{len(right)} right answers: {accepted} accepted.",
        "",
        "| exercise | mistakes | refused | diagnosed | right answers | accepted | seconds per check, right (wrong) |",
        "|---|---|---|---|---|---|---|",
    ]
    for id in dict.fromkeys(row.exercise for row in found):
        bad, good = [r for r in wrong if r.exercise == id], [r for r in right if r.exercise == id]
        counts = (len(bad), _full(bad, "as_due"), _full(bad, "named"), len(good), _full(good, "as_due"))
        seconds = f"{max(r.seconds for r in good):.2f} ({max(r.seconds for r in bad):.2f})"
        lines.append(f"| {' | '.join(map(str, (id, *counts, seconds)))} |")
    lines += ["", "| exercise | mistake | refused | diagnosed as itself |", "|---|---|---|---|"]
    lines += [f"| {r.exercise} | {r.name} | {r.as_due} of {r.checks} | {r.named} of {r.checks} |" for r in wrong]
    return "\n".join(lines) + "\n"


def _full(of: Sequence[Row], what: str) -> int:
    """How many answers came out as due in every single check."""
    return sum(getattr(row, what) == row.checks for row in of)


def _share(part: int, of: Sequence[Row]) -> str:
    checks = sum(row.checks for row in of)
    return f"{part / checks:.1%}" if checks else "none"


def _code(id: str) -> str:
    """A hash of all that an exercise's rows depend on: its lesson's modules, the checker, and the reference package."""
    mine = f"lesson{id[:2]}"
    here, reference = Path(__file__).parent, Path(condiff_ref.__file__).parent
    files = [file for file in sorted(here.glob("*.py")) if not file.stem.startswith("lesson") or mine in file.stem]
    files += [here / f"{name}.py" for name in LENDERS] + sorted(reference.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


LENDERS = ("lesson01", "lesson02")  # other lessons' exercises take facts from these


def _rows_of(id: str, repeats: int) -> tuple[str, list[Row]]:
    before = _code(id)
    found = rows(find(id), range(repeats))
    return before if _code(id) == before else "changed meanwhile", found


class _Kept:
    """Rows of earlier runs, in a file that is written after each exercise."""

    def __init__(self, path: Path, repeats: int):
        self.path, self.repeats = path, repeats
        self.found = json.loads(path.read_text()) if path.exists() else {}

    def get(self, id: str) -> list[Row] | None:
        rows = self.found.get(f"{id}|{self.repeats}|{_code(id)}")
        return rows and [Row(**row) for row in rows]

    def put(self, id: str, code: str, rows: list[Row]) -> None:
        self.found[f"{id}|{self.repeats}|{code}"] = [asdict(row) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found))
        partial.replace(self.path)  # in one move: a kill leaves the old file or the new


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table; 1 if there is a hole in it."""
    parser = argparse.ArgumentParser(description="Try all mistakes and right answers on file.")
    parser.add_argument("file", type=Path, help="where to write the table, as Markdown")
    parser.add_argument("--repeats", type=int, default=20, help="checks of each answer, with fresh inputs")
    parser.add_argument("--kept", type=Path, default=Path("outputs/kill_matrix.json"), help="rows of earlier runs")
    args = parser.parse_args(argv)
    kept = _Kept(args.kept, args.repeats)
    parts = {exercise.id: kept.get(exercise.id) for exercise in exercises()}
    todo = [id for id, rows in parts.items() if not rows]
    # one process per core, each with one thread: threads that wait for one another are slower
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(_rows_of, id, args.repeats): id for id in todo}
        for done in tqdm(as_completed(running), total=len(todo), unit="exercise"):
            code, parts[running[done]] = done.result()
            kept.put(running[done], code, parts[running[done]])
    found = [row for part in parts.values() for row in part]
    args.file.write_text(table(found, args.repeats), encoding="utf-8")
    holes = [row for row in found if row.hole]
    for row in holes:
        what = row.name or "a right answer"
        print(f"{row.exercise} {what}: as due {row.as_due}, named {row.named} of {row.checks}", file=sys.stderr)
    return 1 if holes else 0


if __name__ == "__main__":
    raise SystemExit(main())

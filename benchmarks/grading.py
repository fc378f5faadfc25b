"""What grading costs: per submission, per call, and for a whole class. Writes grading.md beside this file.

python benchmarks/grading.py [--submissions 100] [--workers 1 2] [--levels P0 L1 L2] [--rounds 10]

The submission is a notebook with ten cells, the reference answers of the ten exercises of lesson 04, without the
lesson's figures and training: what it costs is what grading costs, since the answers themselves are short.
"""

import argparse
import contextlib
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from rows import table, write

from condiff_check import checking, guard
from condiff_check.agent import peer, wire
from condiff_check.grading import judge, ledger, redact, sandbox, selfcheck, session
from condiff_check.grading.intake import Cell, Notebook, read_limited
from condiff_check.registry import find, lesson

LESSON, SECRET = "04", b"a secret for timing"
SWAPPED = "def cfg(eps_c, eps_u, scale):\n    return eps_c + scale * (eps_u - eps_c)"  # a mistake on file
CALLED = "import torch\ndef nothing(x):\n    return None\ndef back(x):\n    return x.clone()\n"
CALLED += "def ask(model, x, times):\n    for _ in range(times):\n        model(x)"
NUMBERS = 6_400  # float32: 25 KB
TIMES = 200

READ, SPAWN, CELLS, FORK, KILL = (
    "reading the file",
    "spawn: fork and lock down",
    "running the cells",
    "a fork each",
    "end",
)
FACTS, EXPLAIN, CODE, WAIT, LEND, REST = "facts", "explaining", "encode, decode", "waiting", "lent models", "the rest"
PARTS = {
    READ: "reading the file, in a process of its own",
    SPAWN: "forking a child and locking it down",
    CELLS: "running the cells",
    FORK: "a process of its own for each exercise",
    KILL: "ending all of it",
    FACTS: "the judge's own facts: drawing inputs, references, comparing",
    EXPLAIN: "the judge's own work to explain wrong answers",
    CODE: "the boundary: encoding and decoding in the judge",
    WAIT: "the boundary: waiting for the child, which decodes, runs the answer, encodes",
    LEND: "models that the judge lends, called by the answers",
    REST: "the rest",
}


class Clock:
    """Where the seconds go: each to the innermost part that is under way."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self._open = [REST]
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        self.parts[self._open[-1]] += now - self._since
        self._since = now

    def watched(
        self, owner: object, method: str, name: str, only_in: str | None = None
    ) -> contextlib.AbstractContextManager:
        """Count a function's time under this name; `only_in`: where it is called within that part."""
        plain = getattr(owner, method)

        def timed(*args: object, **kwargs: object) -> object:
            if only_in not in (None, self._open[-1]):
                return plain(*args, **kwargs)
            with self.part(name):
                return plain(*args, **kwargs)

        return patch.object(owner, method, timed)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the parts of grading."""
        with contextlib.ExitStack() as stack:
            for owner, method, name in (
                (sandbox.Sandbox, "spawn", SPAWN),
                (sandbox.Child, "kill", KILL),
                (judge._Attempt, "_cells", CELLS),
                (judge._Attempt, "_connect", FORK),
                (session.Session, "objects", FORK),
                (judge, "try_facts", FACTS),
                (judge, "explain", EXPLAIN),
                (session.RemoteGuard, "__call__", CODE),
                (peer.Peer, "_serve", LEND),
            ):
                stack.enter_context(self.watched(owner, method, name))
            stack.enter_context(self.watched(wire.Wire, "_wait", WAIT, only_in=CODE))
            yield
        self._turn()


# --- one submission ---------------------------------------------------------------------------------------------------


def submissions() -> dict[str, bytes]:
    """What is graded, by what it is."""
    cells = {
        name: [cell["source"] for cell in json.loads(data)["cells"]] for name, data, _ in selfcheck.answers(LESSON)
    }
    right = cells["reference answers"]
    one_off = [selfcheck.SLIGHTLY_OFF, *right, selfcheck.OFF.format(name="cfg")]
    return {
        "ten right answers": selfcheck.notebook(right),
        "one of them a mistake on file": selfcheck.notebook([*right, SWAPPED]),
        "one of them wrong in a way that is on no list": selfcheck.notebook(one_off),
        "all ten wrong in ways that are on no list": selfcheck.notebook(cells["answers that are slightly off"]),
        "nothing done": selfcheck.notebook(cells["empty answers"]),
    }


def grade(grader: judge.Judge, data: bytes, clock: Clock | None = None) -> tuple[float, list]:
    """Seconds and verdicts."""
    clock = clock or Clock()
    began = time.perf_counter()
    with clock.part(READ):
        notebook = read_limited(data)
    verdicts, _, _ = grader.grade(notebook, LESSON)
    return time.perf_counter() - began, verdicts


def per_submission(box: sandbox.Sandbox, rounds: int) -> tuple[dict[str, float], Counter, dict[str, list[float]]]:
    """Medians of seconds by submission; of the right one, seconds by part; by exercise, seconds if right and if not."""
    grader, works = judge.Judge(box, SECRET), submissions()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    exercises: dict[str, list[float]] = {}
    grade(grader, works["ten right answers"])  # warms up
    for turn in range(rounds):
        for name, data in works.items():
            if turn and name.startswith(("all ten", "nothing")):
                continue  # once is enough
            took, verdicts = grade(grader, data)
            seconds[name].append(took)
            outcomes = {verdict.outcome for verdict in verdicts}
            assert (outcomes == {"right"}) == (name == "ten right answers"), (name, outcomes)
            if turn == 0 and name.startswith(("ten", "all ten")):
                for verdict in verdicts:
                    exercises.setdefault(verdict.exercise, []).append(verdict.seconds)
    clock = Clock()
    with clock.watching():
        for _ in range(rounds):
            grade(grader, works["ten right answers"], clock)
    parts = Counter({name: total / rounds for name, total in clock.parts.items()})
    return {name: statistics.median(all_) for name, all_ in seconds.items()}, parts, exercises


def in_process() -> tuple[float, float]:
    """The same facts on the same answers in one process: seconds in all, and in the answers alone."""
    clock = Clock()
    with clock.watched(guard.Guard, "__call__", CODE):
        for exercise in lesson(LESSON):
            checking.judge(exercise, exercise.references, seed=1)  # warms up
        clock.parts.clear()
        began = time.perf_counter()
        for exercise in lesson(LESSON):
            checking.judge(exercise, exercise.references, seed=1)
        return time.perf_counter() - began, clock.parts[CODE]


# --- the boundary -----------------------------------------------------------------------------------------------------


def milliseconds(act: Callable[[], object], rounds: int, within: int = 1) -> float:
    """Median, per one of the `within` things that a round does."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        found.append(time.perf_counter() - began)
    return 1000 * statistics.median(found) / within


def boundary(box: sandbox.Sandbox, rounds: int) -> list[float]:
    """Milliseconds: spawn and kill; a call that sends 25 KB; one that gets them back; a call of a lent model."""
    spawned = milliseconds(lambda: box.spawn().kill(), 3 * rounds)
    exercise = replace(
        find("04.1"), names=("nothing", "back", "ask"), references=(len,) * 3, alternatives=(), mistakes=()
    )
    cells = Notebook((Cell(1, "cell-1", CALLED, ()),), (), None)
    attempt = judge._Attempt(box, sandbox.Limits(), cells, [exercise])
    try:
        opened = attempt.session(exercise)
        nothing, back, ask = opened.objects(exercise.names)
        call, x = opened.guard(600.0), torch.randn(NUMBERS)
        return [
            spawned,
            milliseconds(lambda: call(nothing, x), TIMES),
            milliseconds(lambda: call(back, x), TIMES),
            milliseconds(lambda: call(ask, lambda x: x * 2, x, TIMES), max(3, rounds // 2), TIMES),
        ]
    finally:
        attempt.close()


# --- a class ----------------------------------------------------------------------------------------------------------


def whole_class(level: str, workers: int, students: int) -> dict[str, object]:
    """condiff-grade as it is used: submissions per second after warm-up, and memory while it runs."""
    with tempfile.TemporaryDirectory() as folder:
        cells = [cell["source"] for cell in json.loads(submissions()["ten right answers"])["cells"]]
        for n in range(students):
            file = Path(folder, "submissions", f"student-{n:04}", "04_guidance.ipynb")
            file.parent.mkdir(parents=True)
            file.write_bytes(selfcheck.notebook([*cells, f"# {n}"]))
        out = Path(folder, "results")
        line = [sys.executable, "-m", "condiff_check.cli", str(Path(folder, "submissions")), "-o", str(out), "-q"]
        line += ["--no-self-check", "--workers", str(workers), "--sandbox", level, "--trust-submissions"]
        began = time.monotonic()
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
            seen = list(_watched(process, out / ledger.FILE))
            took = time.monotonic() - began
        assert process.returncode == 0
        points = [json.loads(text)["points"] for text in (out / "results.jsonl").read_text().splitlines()]
        assert len(points) == students and len(set(points)) == 1
    return dict(seconds=took, **_summary([one for one in seen if one[1]], workers, students))


Seen = tuple[float, int, float, float]  # when, how many are graded, megabytes of the parent and of its largest child


def _watched(process: subprocess.Popen, path: Path) -> Iterator[Seen]:
    while process.poll() is None:
        with contextlib.suppress(OSError, sqlite3.Error, ValueError):
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                ((done,),) = database.execute("SELECT count(*) FROM graded")
            children = [resident(int(pid)) for pid in _children(process.pid)]
            yield time.monotonic(), done, resident(process.pid), max(children, default=0.0)
        time.sleep(0.2)


def _children(pid: int) -> list[str]:
    return [one for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def resident(pid: int) -> float:
    """Megabytes of memory that a process has, shared ones included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _summary(seen: Sequence[Seen], workers: int, students: int) -> dict[str, object]:
    warm = next(one for one in seen if one[1] >= workers)  # each worker has imported torch and started its sandbox
    done = next(one for one in seen if one[1] == students)
    places = {name: next(one for one in seen if one[1] >= share * students) for name, share in SHARES.items()}
    return dict(
        speed=(done[1] - warm[1]) / (done[0] - warm[0]),
        parent={name: one[2] for name, one in places.items()},
        worker={name: max(one[3] for one in seen if one[1] <= place[1]) for name, place in places.items()},
    )


SHARES = {"first": 0.0, "middle": 0.5, "last": 1.0}


# --- the page ---------------------------------------------------------------------------------------------------------


def levels(wanted: Sequence[str]) -> list[str]:
    """Those that work here."""
    found = []
    for level in wanted:
        try:
            found.append(sandbox.choose(level))
        except sandbox.SandboxError as error:
            print(error, file=sys.stderr)
    return found


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--submissions", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--levels", nargs="+", choices=sandbox.LEVELS, default=list(sandbox.LEVELS))
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    before, offered = load(), levels(options.levels)
    single, calls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        view = redact.build_view(LESSON, Path(folder, "view"))
        Path(folder).chmod(0o755)
        for level in offered:
            with sandbox.Sandbox(view, level) as box:
                single[level] = per_submission(box, options.rounds)
                calls[level] = boundary(box, options.rounds)
    classes = [(level, n, whole_class(level, n, options.submissions)) for level in offered for n in options.workers]
    write(__file__, "Grading: seconds and megabytes", about(before, options), *page(single, calls, classes))


def about(before: str, options: argparse.Namespace) -> str:
    return (
        f"{os.cpu_count()} cores, load {before} before and {load()} after. A submission: ten cells, the reference "
        "answers of lesson 04's ten exercises, which `condiff-grade` reads, runs and judges as any other; medians of "
        f"{options.rounds} after a first one, but the last two rows once. P0, L1, L2: levels of isolation, see "
        "`condiff-grade --probe`.\n"
    )


def page(single: dict, calls: dict, classes: list) -> Iterator[str]:
    offered = list(single)
    yield "### One submission, in seconds\n"
    names = list(single[offered[0]][0])
    yield table(["what", *offered], [[name, *(f"{single[level][0][name]:.2f}" for level in offered)] for name in names])
    yield "### Where they go, for ten right answers\n"
    rows = [[PARTS[part], *(_share(single[level][1], part) for level in offered)] for part in PARTS]
    yield table(["part", *offered], [row for row in rows if set(row[1:]) != {"0.000 (0 %)"}])
    whole, answers = in_process()
    yield (
        f"In one process, without a boundary, the facts take {whole:.2f} s, of which the answers take {answers:.2f} s: "
        "what the tables show beyond that is the price of not trusting them.\n"
    )
    yield "### By exercise: right, and wrong in a way that is on no list, with its explanation\n"
    columns = [f"{level}, {which}" for level in offered for which in ("right", "wrong")]
    ids = list(single[offered[0]][2])
    yield table(
        ["exercise", *columns],
        [[id, *(f"{seconds:.2f}" for level in offered for seconds in single[level][2][id])] for id in ids],
    )
    yield "### The boundary, in milliseconds\n"
    what = (
        "spawn a child, kill it",
        f"a call with {4 * NUMBERS // 1000} KB",
        "a call that returns as much",
        "a call of a lent model with as much",
    )
    yield table(
        ["what", *offered], [[name, *(f"{calls[level][n]:.2f}" for level in offered)] for n, name in enumerate(what)]
    )
    yield "### A class, from the command line\n"
    yield table(
        [
            "level",
            "workers",
            "submissions per second",
            "seconds in all",
            "MB of the parent: first, middle, last",
            "MB of a worker",
        ],
        [
            [level, n, f"{one['speed']:.2f}", f"{one['seconds']:.0f}", _places(one["parent"]), _places(one["worker"])]
            for level, n, one in classes
        ],
    )
    yield (
        "Per second: from the moment when as many are graded as there are workers. In all: with the start of the "
        "program, of torch and of the sandboxes, and with all pages written. The self-check is off.\n"
    )


def _share(parts: Counter, part: str) -> str:
    return f"{parts[part]:.3f} ({parts[part] / parts.total():.0%})".replace("%)", " %)")


def _places(seen: dict[str, float]) -> str:
    return ", ".join(f"{megabytes:.0f}" for megabytes in seen.values())


if __name__ == "__main__":
    main()

"""kill -9 of a real batch: real notebooks, real sandboxes, the command as instructors type it."""

import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from condiff_check.registry import find

STUDENTS, KILLS = 100, 10
EXERCISE = "04.1"
ANSWERS = (
    "def cfg(eps_c, eps_u, scale):\n    return eps_u + scale * (eps_c - eps_u)",
    "def cfg(eps_c, eps_u, scale):\n    return eps_c + scale * (eps_u - eps_c)",
    "def cfg(eps_c, eps_u, scale):\n    raise NotImplementedError",
    "while True:\n    break\ncfg = print",
)
RIGHT = (True, False, False, False)

pytestmark = pytest.mark.slow


@pytest.fixture
def submissions(tmp_path) -> Path:
    folder = tmp_path / "submissions"
    for k in range(STUDENTS):
        cell = nbformat.v4.new_code_cell(f"# {k}\n{ANSWERS[k % len(ANSWERS)]}", id="answer")
        student = folder / f"student{k:03}"
        student.mkdir(parents=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), student / "04_classifier_free_guidance.ipynb")
    return folder


def command(submissions: Path, out: Path) -> list[str]:
    options = ["--only", EXERCISE, "--workers", "2", "--trust-submissions", "--no-self-check", "--quiet"]
    return [sys.executable, "-m", "condiff_check.cli", str(submissions), "-o", str(out), *options]


def timeless(out: Path) -> list[dict]:
    """What was found, without times."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for one in found:
        for name in ("seconds", "graded_at"):
            one.pop(name, None)
        for verdict in one["verdicts"]:
            verdict.pop("seconds", None)
    return found


def test_a_batch_that_is_killed_ten_times_ends_as_one_that_is_not(submissions, tmp_path):
    (tmp_path / "secret").write_text("5a" * 32)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
        (out / "secret").write_bytes((tmp_path / "secret").read_bytes())
    subprocess.run(command(submissions, whole), check=True)

    generator, kills, done = random.Random(7), 0, []
    while kills < KILLS:
        run = subprocess.Popen(command(submissions, killed))
        before = _graded(killed)
        goal = before + generator.randrange(0, 9)
        while _graded(killed) < goal and run.poll() is None:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 0.3))
        run.kill()
        kills += run.wait() == -signal.SIGKILL
        done.append(_graded(killed))
        assert done == sorted(done)  # nothing that was there is lost
    assert 0 < done[-1] < STUDENTS
    subprocess.run(command(submissions, killed), check=True)

    assert len(timeless(killed)) == STUDENTS
    assert timeless(killed) == timeless(whole)
    for name in ("scores.csv", "mistakes.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    points = find(EXERCISE).points
    earned = [verdict["points"] for one in timeless(killed) for verdict in one["verdicts"]]
    assert earned == [points * RIGHT[k % len(RIGHT)] for k in range(STUDENTS)]
    assert _times_graded(killed) == [1] * STUDENTS


def _graded(out: Path) -> int:
    """Submissions in the ledger."""
    return len(_log(out))


def _log(out: Path) -> list[str]:
    """The submissions as they were graded, one after the other."""
    if not (out / "ledger.sqlite").exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True)) as database:
        try:
            return [name for (name,) in database.execute("SELECT submission FROM log ORDER BY number")]
        except sqlite3.OperationalError:  # its tables are just being made
            return []


def _times_graded(out: Path) -> list[int]:
    names = _log(out)
    return [names.count(name) for name in sorted(set(names))]

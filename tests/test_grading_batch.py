"""The ledger and the batch: nothing is lost, nothing is graded twice, whatever dies."""

import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock
from rich.console import Console

import grading_workers
from condiff_check.grading import batch
from condiff_check.grading.batch import BatchError, Local, Settings, Task, identical
from condiff_check.grading.ledger import FILE, Key, Ledger, LedgerError, merge
from condiff_check.grading.results import Graded, Verdict, to_json

TESTS = Path(__file__).parent
CHEAP = Settings(secret="00" * 16, worker="grading_workers:Cheap")
EXERCISES = grading_workers.EXERCISES


@pytest.fixture(autouse=True)
def workers_find_this_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))


def task(id: str, data: bytes) -> Task:
    return Task(id, id, "04", f"{id}.ipynb", hashlib.sha256(data).hexdigest())


def many(n: int) -> dict[str, bytes]:
    return {f"s{k:03}": f"submission {k}".encode() for k in range(n)}


def run(contents: dict[str, bytes], *, workers: int = 2, deadline: float = 20, settings: Settings = CHEAP):
    with Local(settings, workers, lambda _: deadline) as engine:
        found = engine.run([task(*item) for item in contents.items()], lambda one: contents[one.submission])
        return {graded.submission: graded for graded in found}


def timeless(graded: Graded) -> Graded:
    return dataclasses.replace(graded, seconds=0.0, graded_at="")


def key(id: str, **changes: str) -> Key:
    return dataclasses.replace(Key(id, "00", "11", "22", "33"), **changes)


def graded(id: str, **points: float) -> Graded:
    verdicts = tuple(Verdict(name[1:].replace("_", "."), ("f",), "right", x, 1.0) for name, x in points.items())
    return Graded(id, id, "04", "x.ipynb", "00", "graded", verdicts)


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that have this folder as their TMPDIR."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}".encode() in (path / "environ").read_bytes():
                found.append(f"{path.name} {(path / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    return [line for line in found if not line.startswith(f"{os.getpid()} ")]


# --- engine -----------------------------------------------------------------------------------------------------------


def test_every_submission_is_graded_once_and_two_runs_agree(tmp_path):
    first, second = run(many(30)), run(many(30), workers=3)
    assert sorted(first) == sorted(many(30))
    assert {id: timeless(one) for id, one in first.items()} == {id: timeless(one) for id, one in second.items()}
    assert not processes_of(tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_a_worker_that_dies_or_hangs_or_raises_costs_its_submission_only():
    odd = {"crash": b"crash", "hang": b"hang", "raise": b"raise"}
    found = run(many(10) | odd, deadline=1.5)
    assert len(found) == 13
    for id, why in {"crash": "signal 11", "hang": "no end after 2 s", "raise": "ArithmeticError"}.items():
        assert found[id].status == "grader error"
        assert {verdict.outcome for verdict in found[id].verdicts} == {"grader error"}
        assert why in found[id].verdicts[0].reason
    assert all(one.status == "graded" for id, one in found.items() if id not in odd)


def test_what_failed_once_is_tried_once_more(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAP_MARKER", str(tmp_path / "marker"))
    assert run({"a": b"once"})["a"].status == "graded"


def test_where_no_worker_starts_the_batch_stops_and_says_why(monkeypatch):
    monkeypatch.setenv("CHEAP_FAILS", "1")
    with pytest.raises(BatchError, match="no sandbox here"):
        run(many(5))


def test_a_file_that_changes_or_goes_away_is_our_problem_and_not_the_students():
    def read(one: Task) -> bytes:
        if one.submission == "gone":
            raise FileNotFoundError(2, "No such file or directory")
        return b"other bytes"

    with Local(CHEAP, 1, lambda _: 20.0) as engine:
        found = {one.submission: one for one in engine.run([task("gone", b""), task("changed", b"x")], read)}
    assert found["gone"].status == found["changed"].status == "grader error"
    assert "changed while" in found["changed"].verdicts[0].reason


def test_a_file_called_torch_beside_the_batch_is_not_imported(tmp_path, monkeypatch):
    for name in ("torch.py", "json.py", "condiff_check.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the folder of the batch')")
    monkeypatch.chdir(tmp_path)
    assert run({"a": b"a"})["a"].status == "graded"


def test_reading_keeps_pace_with_grading():
    ahead, most = 0, 0

    def tasks():
        nonlocal ahead, most
        for k in range(60):
            ahead += 1
            most = max(most, ahead)
            yield task(f"s{k}", b"x")

    with Local(CHEAP, 2, lambda _: 20.0) as engine:
        for _ in engine.run(tasks(), lambda _: b"x"):
            ahead -= 1
    assert most <= 5


def test_identical_bytes_of_two_students_are_flagged_and_all_is_sorted():
    found = run({"b": b"same", "a": b"same", "c": b"own"})
    flagged = identical([found["c"], found["b"], found["a"]])
    assert [one.submission for one in flagged] == ["a", "b", "c"]
    assert [one.identical_to for one in flagged] == [("b",), ("a",), ()]


def test_the_engine_never_unpickles():
    for name in ("batch", "ledger", "commands"):
        source = Path(batch.__file__).with_name(f"{name}.py").read_text()
        assert not re.search(r"import pickle|import dill|cloudpickle|joblib|torch\.load|\.recv\(\)|\.send\(", source)


# --- ledger -----------------------------------------------------------------------------------------------------------


def test_what_was_put_is_there_for_the_next_run(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(key("b"), graded("b", e04_1=1, e04_2=0))
        ledger.put(key("a"), graded("a", e04_1=1, e04_2=1))
    with Ledger(tmp_path) as ledger:
        assert [one.submission for one in ledger.all()] == ["a", "b"]
        assert ledger.get(key("b")) == graded("b", e04_1=1, e04_2=0)
        assert ledger.done(key("a"), ("04.1", "04.2"))
        assert not ledger.done(key("c"), ("04.1",))


@pytest.mark.parametrize("changed", ["sha256", "exercises", "grader", "secret"])
def test_another_notebook_exercise_grader_or_secret_is_graded_anew(tmp_path, changed):
    with Ledger(tmp_path) as ledger:
        ledger.put(key("a"), graded("a", e04_1=1))
        assert not ledger.done(key("a", **{changed: "new"}), ("04.1",))


def test_exercises_that_are_missing_are_graded_and_merged(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(key("a"), graded("a", e04_10=1, e04_2=0))
        assert ledger.todo(key("a"), ("04.2", "04.3", "04.10")) == ("04.3",)
        whole = ledger.put(key("a"), graded("a", e04_3=1))
        assert [verdict.exercise for verdict in whole.verdicts] == ["04.2", "04.3", "04.10"]
        assert ledger.done(key("a"), ("04.2", "04.3", "04.10"))


def test_regrade_is_for_one_exercise_and_goes_on_after_a_stop(tmp_path):
    with Ledger(tmp_path) as ledger:
        for id in "abc":
            ledger.put(key(id), graded(id, e04_1=0, e04_2=1))
        assert ledger.regrade("04.1") == 3
        assert ledger.todo(key("a"), ("04.1", "04.2")) == ("04.1",)
        ledger.put(key("a"), graded("a", e04_1=1))
    with Ledger(tmp_path) as ledger:
        assert ledger.regrade("04.1") == 2  # the same command again: what is left, and no more
        assert ledger.done(key("a"), ("04.1", "04.2"))
        assert [(v.exercise, v.points) for v in ledger.get(key("a")).verdicts] == [("04.1", 1.0), ("04.2", 1.0)]
        for id in "bc":
            ledger.put(key(id), graded(id, e04_1=1))
        assert ledger.regrade("04.1") == 3


def test_regrade_is_for_what_is_handed_in_now(tmp_path):
    with Ledger(tmp_path) as ledger:
        for sha256 in ("old", "new"):
            ledger.put(key("a", sha256=sha256), graded("a", e04_1=0))
        assert ledger.regrade("04.1", [key("a", sha256="new")]) == 1
        assert ledger.done(key("a", sha256="old"), ("04.1",))
        ledger.put(key("a", sha256="new"), graded("a", e04_1=1))
        assert ledger.regrade("04.1", [key("a", sha256="new")]) == 1


def test_our_own_error_without_a_verdict_is_tried_again_and_an_unreadable_file_is_not(tmp_path):
    with Ledger(tmp_path) as ledger:
        for status in ("grader error", "unreadable"):
            ledger.put(key(status), dataclasses.replace(graded("a"), status=status))
        assert not ledger.done(key("grader error"))
        assert ledger.done(key("unreadable"))


def test_a_settled_grader_error_makes_the_submission_graded():
    broken = dataclasses.replace(graded("a", e04_1=0), status="grader error")
    broken = dataclasses.replace(broken, verdicts=(dataclasses.replace(broken.verdicts[0], outcome="grader error"),))
    assert merge(broken, graded("a", e04_1=1)).status == "graded"
    assert merge(graded("a", e04_2=1), broken).status == "grader error"


def test_results_of_a_run_that_cannot_be_trusted_are_forgotten(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(key("a"), graded("a", e04_1=1))
        before = ledger.last()
        ledger.put(key("b"), graded("b", e04_1=1))
        ledger.forget(before)
        assert [one.submission for one in ledger.all()] == ["a"]
        assert ledger.log() == [("a", ("04.1",))]


def test_two_runs_on_one_folder_do_not_meet(tmp_path):
    with Ledger(tmp_path), pytest.raises(LedgerError, match="another condiff-grade"), Ledger(tmp_path):
        pass
    with Ledger(tmp_path):
        pass  # and it is free again


def test_the_lock_of_a_killed_run_does_not_block(tmp_path):
    code = f"""
import time
from pathlib import Path
from condiff_check.grading.ledger import Ledger
with Ledger(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(LedgerError, match="another"), Ledger(tmp_path):
            pass
        other.kill()
        other.wait()
    with Ledger(tmp_path):
        pass


@pytest.mark.parametrize("damage", ["no database", "middle", "result"])
def test_a_damaged_ledger_is_told_in_plain_words(tmp_path, damage):
    with Ledger(tmp_path) as ledger:
        for k in range(200):
            ledger.put(key(f"s{k}"), graded(f"s{k}", e04_1=1))
    file = tmp_path / FILE
    if damage == "no database":
        file.write_bytes(b"<html>not a database at all</html>" * 100)
    elif damage == "middle":
        data = bytearray(file.read_bytes())
        data[5000 : len(data) - 5000] = b"\xff" * (len(data) - 10000)
        file.write_bytes(data)
    else:
        with sqlite3.connect(file) as database:
            database.execute("UPDATE graded SET result = '{}'")
    with pytest.raises(LedgerError, match="damaged.*move it aside"), Ledger(tmp_path) as ledger:
        list(ledger.all())


def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(key("a"), graded("a", e04_1=1))
        ledger._sql("PRAGMA max_page_count = 12")  # sqlite's own way to run out of room
        large = dataclasses.replace(graded("b"), output="x" * 100_000)
        with pytest.raises(LedgerError, match="no space left.*goes on from here"):
            ledger.put(key("b"), large)
        assert ledger.get(key("a")) is not None
    with Ledger(tmp_path) as ledger:
        ledger.put(key("z"), graded("z", e04_1=1))


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot write to the results folder"), Ledger(tmp_path / "file" / "results"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
def test_a_read_only_folder_is_told(tmp_path):
    with Ledger(tmp_path / "results"):
        pass
    code = f"""
import os
from pathlib import Path
from condiff_check.grading.ledger import Ledger, LedgerError
os.setgid(65534); os.setuid(65534)
try:
    Ledger(Path({str(tmp_path / "results")!r})).__enter__()
except LedgerError as error:
    print("told", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("told cannot write"), done


# --- kill -------------------------------------------------------------------------------------------------------------

BATCH = """
import hashlib, sys
from pathlib import Path
from condiff_check.grading.batch import Local, Settings, Task
from condiff_check.grading.ledger import Key, Ledger

out, n = Path(sys.argv[1]), int(sys.argv[2])
contents = {f"s{k:03}": f"submission {k}".encode() for k in range(n)}
exercises = ("04.1", "04.2", "04.3")
with Ledger(out) as ledger:
    tasks = []
    for id, data in contents.items():
        sha = hashlib.sha256(data).hexdigest()
        if not ledger.done(Key(id, sha, "e", "g", "s"), exercises):
            tasks.append(Task(id, id, "04", id, sha))
    print("begin", len(tasks), flush=True)
    with Local(Settings(secret="00" * 16, worker="grading_workers:Cheap"), 2, lambda _: 20.0) as engine:
        for graded in engine.run(tasks, lambda task: contents[task.submission]):
            ledger.put(Key(graded.submission, graded.sha256, "e", "g", "s"), graded)
            print("put", graded.submission, flush=True)
print("end", flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_and_grades_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAP_SECONDS", "0.02")
    command = [sys.executable, "-c", BATCH, str(tmp_path / "results"), "100"]
    generator, reported, kills, ended = random.Random(5), [], 0, False
    while not ended:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            lines = []
            if kills < 6:  # at any moment: once while it starts, then after some more results, and a bit
                lines = [run.stdout.readline() for _ in range(generator.randrange(1, 25) if kills else 0)]
                time.sleep(generator.uniform(0, 0.1))
                run.kill()
            lines += run.stdout.readlines()
        kills += run.wait() == -signal.SIGKILL
        lines = [line for line in lines if line.endswith("\n")]  # the last one may be cut off
        ended = "end\n" in lines
        reported += [line.split()[1] for line in lines if line.startswith("put")]
        wait_for(lambda: not processes_of(tmp_path / "scratch"))
        assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert kills >= 4
    with Ledger(tmp_path / "results") as ledger:
        log = [id for id, _ in ledger.log()]
        resumed = [timeless(one) for one in ledger.all()]
    assert sorted(log) == sorted(many(100))  # each one, and once
    assert len(set(reported)) == len(reported)
    assert set(reported) <= set(log)
    assert resumed == sorted(map(timeless, run_whole()), key=lambda one: one.submission)


def run_whole() -> list[Graded]:
    return [dataclasses.replace(one, file=one.submission) for one in run(many(100)).values()]


def wait_for(condition, seconds: float = 8) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- the whole command ------------------------------------------------------------------------------------------------

CLI = """
import functools, signal, sys
from condiff_check import cli
from condiff_check.grading import commands
worker = sys.argv.pop(1)
commands.Options = functools.partial(commands.Options, worker=f"grading_workers:{worker}")
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background is born deaf to it
cli.main()
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight notebooks for lesson 04, two of them the same."""
    folder = tmp_path / "submissions"
    for k in range(8):
        (folder / f"student{k}").mkdir(parents=True)
        cell = dict(cell_type="code", id="a", metadata={}, source=f"x = {k % 7}", outputs=[], execution_count=None)
        text = json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell]))
        (folder / f"student{k}" / "04_guidance.ipynb").write_text(text)
    return folder


@pytest.fixture
def exercises(monkeypatch) -> list[str]:
    from condiff_check.registry import lesson

    ids = [exercise.id for exercise in lesson("04")]
    monkeypatch.setenv("CHEAP_EXERCISES", " ".join(ids))
    return ids


def test_a_folder_is_graded_resumed_regraded_and_the_grader_checked(folder, tmp_path, exercises, monkeypatch, capsys):
    out = folder / "results"  # inside: what lies there is no submission
    code, said = grade(folder, "-o", out, "--json", "--quiet", worker="Upright")
    assert code == 0, said
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(one["verdicts"]) for one in lines] == [len(exercises)] * 8
    same = {one["student"]: one["identical_to"] for one in lines}
    assert len(same["student0"]) == len(same["student7"]) == 1
    assert not same["student1"]
    assert (out / "index.html").exists() and (out / "scores.csv").exists()
    assert (out / "secret").stat().st_mode & 0o777 == 0o600
    assert said.count("trying the grader on known answers to lesson 04") == 2

    code, said = grade(folder, "-o", out, "--quiet", "--regrade", exercises[0], worker="Upright")
    assert code == 0, said
    assert "to look at" not in said
    with Ledger(out) as ledger:
        log = ledger.log()
    assert [ids for _, ids in log] == [tuple(exercises)] * 8 + [(exercises[0],)] * 8

    monkeypatch.setenv("CHEAP_FOOLED", "answers that are slightly off")
    (folder / "student0" / "04_guidance.ipynb").write_text("{}")
    code, said = grade(folder, "-o", out, "--json", "--quiet", worker="Upright")
    assert code == 1
    assert not capsys.readouterr().out
    assert "slightly off: exercise 04.1 came out as 'right'" in said
    assert "nothing is exported" in said


def test_ctrl_c_ends_tidily_and_the_same_command_goes_on(folder, tmp_path, exercises, monkeypatch):
    monkeypatch.setenv("CHEAP_SECONDS", "1")
    out = tmp_path / "results"
    arguments = [str(folder), "-o", str(out), "--no-self-check", "--workers", "1", "--quiet"]
    with subprocess.Popen([sys.executable, "-c", CLI, "Cheap", *arguments], stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: (out / FILE).exists() and rows(out) >= 2, 90)
        run.send_signal(signal.SIGINT)
        words = run.stderr.read()
    assert run.wait() == 130
    assert "the same command goes on" in words
    assert "Traceback" not in words
    assert not processes_of(tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())
    begun = rows(out)
    assert 2 <= begun < 8
    monkeypatch.setenv("CHEAP_SECONDS", "0")
    assert grade(*arguments)[0] == 0
    assert rows(out) == 8


def rows(out: Path) -> int:
    try:
        with sqlite3.connect(f"file:{out / FILE}?mode=ro", uri=True) as database:
            return database.execute("SELECT COUNT(*) FROM log").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_what_cannot_work_is_told_in_a_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rubric.yaml").write_text("exercises: {04.99: 1}")
    out = tmp_path / "results"
    for arguments, words in [
        ((tmp_path / "nowhere", "-o", out), "there are no submissions at"),
        ((tmp_path / "empty", "-o", out), "no notebooks to grade"),
        ((folder, "-o", folder), "a folder of their own"),
        ((folder, "-o", out, "--lesson", "44"), "there is no lesson '44'"),
        ((folder, "-o", out, "--only", "04.77"), "there is no exercise '04.77'"),
        ((folder, "-o", out, "--rubric", tmp_path / "rubric.yaml"), "rubric.yaml:1: exercises.04.99"),
    ]:
        code, said = grade(*arguments)
        assert code == 1, arguments
        assert words in said


def grade(*arguments: object, worker: str = "Cheap") -> tuple[int, str]:
    """Exit code and messages of condiff-grade in this process, with these workers."""
    from condiff_check import cli
    from condiff_check.grading import commands

    said = StringIO()
    options = functools.partial(commands.Options, worker=f"grading_workers:{worker}")
    with (
        patch.object(sys, "argv", ["condiff-grade", *map(str, arguments)]),
        patch.object(cli, "messages", Console(file=said, width=400)),
        patch.object(commands, "Options", options),
        redirect_stderr(said),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    return end.value.code or 0, said.getvalue()


def test_help_comes_at_once_and_without_torch():
    code = "import sys; from condiff_check import cli; print('torch' in sys.modules, 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
    start = time.process_time()
    done = subprocess.run([sys.executable, "-m", "condiff_check.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--regrade" in done.stdout
    assert time.process_time() - start < 1


def test_with_codes_times_and_overrides_still_count_and_no_name_is_left(folder, tmp_path, exercises, capsys):
    out = tmp_path / "results"
    (folder / "student3").rename(folder / "brannigan")
    (folder / "zapp").mkdir()
    (folder / "zapp" / "kroker.pdf").write_text("")
    for name in ("a", "b"):
        (folder / "leela").mkdir(exist_ok=True)
        (folder / "leela" / f"04_{name}_turanga.ipynb").write_text("{}")
    assert grade(folder, "-o", out, "--quiet", "--no-self-check")[0] == 3
    assert (out / "students" / "brannigan-04.html").exists()
    (tmp_path / "times.csv").write_text("student,time\nbrannigan,2031-05-04T00:00Z\n")
    override = f"{{student: brannigan, exercise: {exercises[0]}, points: 7, comment: x}}"
    rubric = f"deadline: 2031-05-02T12:00Z\nlate: {{per_day: 10%}}\nsubmitted: times.csv\noverrides: [{override}]\n"
    (tmp_path / "rubric.yaml").write_text(rubric)
    options = ("--rubric", tmp_path / "rubric.yaml", "--anonymise", "--json", "--quiet", "--no-self-check")
    capsys.readouterr()
    code, said = grade(folder, "-o", out, *options)
    assert code == 3, said
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (one,) = [line for line in lines if line["late_note"].startswith("late, day 2: 20% off")]
    assert one["verdicts"][0]["points"] == 7 and one["late"] > 0
    assert "hits nothing" not in said
    names = (out / "names.csv").read_text()
    assert "brannigan" in names and "kroker" in names and "turanga" in names
    assert (out / "names.csv").stat().st_mode & 0o777 == 0o600
    for path in [*out.rglob("*.html"), *out.glob("*.csv"), out / "results.jsonl"]:
        if path.name != "names.csv":
            assert not re.search(r"brannigan|student\d|zapp|kroker|leela|turanga", path.read_text() + path.name), path
    assert "which names.csv tells" in said


def test_only_and_withdrawn_and_other_limits(folder, tmp_path, exercises):
    out = tmp_path / "results"
    options = ("-o", out, "--quiet", "--no-self-check")
    assert grade(folder, *options)[0] == 0
    scores = (out / "scores.csv").read_text()
    code, said = grade(folder, *options, "--only", exercises[0])
    assert code == 0 and "graded already" in said
    assert (out / "scores.csv").read_text() == scores  # all that the ledger knows
    shutil.rmtree(folder / "student3")
    assert grade(folder, *options)[0] == 0
    assert not (out / "students" / "student3-04.html").exists() and len(list((out / "students").iterdir())) == 7
    code, said = grade(folder, *options, "--cell-seconds", "20")
    assert "7 graded before are graded again: the limits of time are others" in said
    assert "7 of 7 graded" in said
    code, said = grade(folder, "-o", tmp_path / "part", "--quiet", "--no-self-check", "--only", exercises[0])
    assert "not all exercises of 7 submissions are graded yet" in said


def test_what_the_grader_failed_on_is_graded_again_by_the_same_command(folder, tmp_path, exercises, monkeypatch):
    options = (folder, "-o", tmp_path / "results", "--quiet", "--no-self-check")
    monkeypatch.setenv("CHEAP_BROKEN", "1")
    code, said = grade(*options, worker="Broken")
    assert code == 3
    assert "the disk was full" in said
    monkeypatch.delenv("CHEAP_BROKEN")
    code, said = grade(*options, worker="Broken")
    assert code == 0
    assert "8 graded before are graded again: the grader failed on them" in said
    with Ledger(tmp_path / "results") as ledger:
        assert [ids for _, ids in ledger.log()][8:] == [(exercises[0],)] * 8


def test_another_secret_is_refused_unless_it_is_asked_for(folder, tmp_path, exercises):
    out, mine = tmp_path / "results", tmp_path / "mine"
    mine.write_text("0" * 64)
    options = (folder, "-o", out, "--quiet", "--no-self-check")
    assert grade(*options, "--secret", mine)[0] == 0
    code, said = grade(*options)
    assert code == 1
    assert "--secret FILE" in said and "--new-secret" in said
    assert not (out / "secret").exists()
    code, said = grade(*options, "--secret", mine)
    assert code == 0 and "graded already" in said
    code, said = grade(*options, "--new-secret")
    assert code == 0
    assert "8 graded before are graded again: the secret is another one" in said
    assert grade(*options)[0] == 0
    first = (out / "secret").read_bytes()
    assert grade(*options, "--new-secret")[0] == 0
    assert [path.read_bytes() for path in out.glob("secret.*")] == [first]


def test_what_the_command_line_does_not_change_is_told(tmp_path):
    from condiff_check.grading import commands

    keys = {"a": key("a"), "b": key("b")}
    plan, options = commands.Plan(keys, {}, ()), commands.Options(Path("x"), Path("y"), required="L2", paranoid=True)
    said = StringIO()
    with Ledger(tmp_path) as ledger:
        ledger.put(keys["a"], dataclasses.replace(graded("a"), level="L1"))
        ledger.put(keys["b"], dataclasses.replace(graded("b"), level="L2"))
        there = commands._kept([], plan, ledger, dataclasses.replace(CHEAP, sandbox="L2", probed=True), options)
        cluster = commands._kept([], plan, ledger, CHEAP, options)
        commands._show_levels([task("a", b""), task("b", b"")], plan, ledger, Console(file=said))
    assert [line.partition(";")[0] for line in there] == [
        "1 are graded already, at L1, and stay as they are",
        "2 are graded already, and --paranoid makes no difference to them",
    ]
    assert cluster[0].startswith("1 are graded already with less than L2")
    assert said.getvalue() == "isolation: L1 (1), L2 (1)\n"


def test_a_worker_that_is_ended_closes_its_sandboxes(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAP_CLOSED", str(tmp_path / "closed"))
    run({"a": b"a"}, workers=1)
    assert (tmp_path / "closed").exists()
    run({"hang": b"hang"}, workers=1, deadline=1.5)  # this one cannot, and what it left goes with its folder
    assert not list((tmp_path / "scratch").iterdir())


def test_what_killed_runs_left_is_swept_and_what_is_in_use_is_not(tmp_path):
    scratch = tmp_path / "scratch"
    old = time.time() - 90_000
    for name in ("condiff-grade-dead", "condiff-grade-busy", "condiff-abcdefgh", "condiff-own_file"):
        (scratch / name / "work").mkdir(parents=True)
    for name in ("dead", "busy"):
        (scratch / f"condiff-grade-{name}" / "lock").touch()
    (scratch / "condiff-own_file" / "thesis.tex").touch()
    for path in scratch.iterdir():
        os.utime(path, (old, old))
    with FileLock(scratch / "condiff-grade-busy" / "lock"):
        batch.sweep()
    assert sorted(path.name for path in scratch.iterdir()) == ["condiff-grade-busy", "condiff-own_file"]


@pytest.mark.parametrize(
    ("given", "due"),
    [
        (["x", "--require-sandbox"], ["x", "--require-sandbox=L2"]),
        (["--require-sandbox", "L1", "x"], ["--require-sandbox=L1", "x"]),
        (["--require-sandbox=L1", "x"], ["--require-sandbox=L1", "x"]),
        (["--require-sandbox", "x", "-o", "y"], ["--require-sandbox=L2", "x", "-o", "y"]),
    ],
)
def test_the_level_after_require_sandbox_may_be_left_out(given, due):
    from condiff_check.cli import _with_levels

    assert _with_levels(given) == due


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path):
    code = "import sys; from condiff_check import cli\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "nowhere", "-o", tmp_path], capture_output=True, text=True)
    assert done.stdout == "False\n"
    assert done.returncode == 1 and "there are no submissions at nowhere" in done.stderr


def test_no_level_below_L1_without_trust():
    from condiff_check.grading import commands

    options = commands.Options(Path("x"), Path("y"), sandbox="P0")
    with (
        patch.object(commands.sandbox, "choose", return_value="P0"),
        pytest.raises(ValueError, match="--sandbox P0 lets a submission read your files"),
    ):
        commands._settings(options, b"0" * 32, Console(file=StringIO()))


def test_a_student_reads_the_own_line_that_raised(folder, tmp_path, exercises):
    cell = dict(
        cell_type="code", id="a", metadata={}, source="def f():\n    own_line()", outputs=[], execution_count=None
    )
    text = json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell]))
    (folder / "student1" / "04_guidance.ipynb").write_text(text)
    out = tmp_path / "results"
    grade(folder, "-o", out, "--quiet", "--no-self-check", worker="Raising")
    assert "at line 2 of f: own_line()" in (out / "students" / "student1-04.html").read_text()
    assert "own_line" not in (out / "students" / "student2-04.html").read_text()


# --- cluster ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_results(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra condiff[cluster] is not installed")
    from condiff_check.grading.cluster import Cluster

    batch.versions.cache_clear()  # as the source is now, should somebody be at work on it
    contents = many(40) | {"crash": b"crash"}
    tasks = [task(*item) for item in contents.items()]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Cluster(CHEAP, cluster.scheduler_address, chunk=7) as engine:
            found = {one.submission: one for one in engine.run(tasks, lambda one: contents[one.submission])}
        monkeypatch.setattr("condiff_check.grading.cluster.versions", lambda: (("exercises", "others"),))
        with pytest.raises(BatchError, match="another version of exercises"), Cluster(CHEAP, cluster.scheduler_address):
            pass
    assert found.pop("crash").status == "grader error"
    here = run(many(40))
    assert {id: timeless(one) for id, one in found.items()} == {id: timeless(one) for id, one in here.items()}


def test_a_scheduler_that_does_not_answer_is_told():
    pytest.importorskip("distributed", reason="the extra condiff[cluster] is not installed")
    from condiff_check.grading.cluster import Cluster

    with pytest.raises(BatchError, match="no Dask scheduler answers"), Cluster(CHEAP, "tcp://127.0.0.1:9", timeout=1):
        pass


def test_a_result_is_one_line_of_json():
    assert "\n" not in to_json(graded("a", e04_1=1))

"""What condiff-grade does, step by step: find, grade what the ledger does not have, score, write."""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

from ..registry import find
from ..registry import lesson as exercises_of
from ..registry import lessons as all_lessons
from . import batch, discover, feedback, gradescope, report_html, sandbox, selfcheck, tables
from .batch import BatchError, Engine, Settings, Task
from .intake import Unreadable, read_limited
from .ledger import Key, Ledger, LedgerError
from .listing import Entry
from .results import Graded
from .rubric import Rubric, Scored, metadata_times, read_rubric

FORESEEN = (BatchError, LedgerError, sandbox.SandboxError, ValueError, OSError, ImportError)


@dataclass(frozen=True)
class Options:
    """As on the command line."""

    submissions: Path
    out: Path
    lesson: str | None = None
    rubric: Path | None = None
    roster: Path | None = None
    only: tuple[str, ...] = ()
    regrade: tuple[str, ...] = ()
    workers: int = 1
    scheduler: str | None = None
    sandbox: str = "auto"
    required: str | None = None
    paranoid: bool = False
    trusted: bool = False
    secret: Path | None = None
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    anonymise: bool = False
    gradescope: Path | None = None
    visibility: str = "visible"
    nbgrader: str | None = None
    json: bool = False
    quiet: bool = False
    self_check: bool = True
    worker: str = batch.WORKER


@dataclass(frozen=True)
class Plan:
    """What is to be looked at, with the exercises wanted of it, and what cannot even be read."""

    keys: Mapping[str, Key]
    submissions: Mapping[str, discover.Submission]
    broken: Sequence[Graded]


def grade(options: Options, messages: Console, results: Console) -> bool:
    """Grade, score and write. Whether something needs a look."""
    _check(options)
    rubric = read_rubric(options.rubric) if options.rubric else Rubric()
    with Ledger(options.out) as ledger:
        secret = read_secret(options.secret or options.out / "secret", make=options.secret is None)
        found, problems = _find(options, rubric, secret)
        settings = _settings(options, secret, messages)
        plan = _plan(found, settings, options)
        for exercise in options.regrade:
            messages.print(f"exercise {exercise}: {ledger.regrade(exercise, plan.keys.values())} to grade again")
        tasks = _tasks(plan, ledger, options)
        if tasks:
            _run(tasks, plan, ledger, settings, options, messages)
        elif plan.submissions:
            messages.print("all of it is graded already; writing the results again")
        graded = _collect(plan, ledger, options)
        times = _times(rubric, plan.submissions, options.submissions)
        scored = [rubric.score(one, times.get(one.submission)) for one in batch.identical(graded)]
        problems += [f"the rubric's override for {each} hits nothing" for each in rubric.unused(graded)]
        _write(scored, problems, found, rubric, options)
        _show(scored, problems, found.missing, options, messages, results)
    return bool(problems) or any(_needs_a_look(one) for one in scored)


# --- before -----------------------------------------------------------------------------------------------------------


def _check(options: Options) -> None:
    if not options.submissions.exists():
        raise ValueError(f"there are no submissions at {options.submissions}")
    if options.submissions.resolve() == options.out.resolve():
        raise ValueError("the results need a folder of their own: give another one after -o")
    if options.lesson is not None and options.lesson not in all_lessons():
        raise ValueError(f"there is no lesson {options.lesson!r}: there are {', '.join(all_lessons())}")
    for exercise in (*options.only, *options.regrade):
        try:
            find(exercise)
        except KeyError as error:
            raise ValueError(error.args[0]) from None


def read_secret(path: Path, *, make: bool = False) -> bytes:
    """The course's secret, which whoever reads the file can use to know the hidden inputs."""
    if make and not path.exists():
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with open(os.open(path.parent / part.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    secret = path.read_bytes().strip()
    if len(secret) < 16:
        raise ValueError(f"{path} is too short for a secret: it needs 16 characters or more, drawn at random")
    return secret


def _find(options: Options, rubric: Rubric, secret: bytes) -> tuple[discover.Found, list[str]]:
    lesson = options.lesson or (rubric.lessons[0] if len(rubric.lessons) == 1 else None)
    code = secret if options.anonymise else None
    found = discover.discover(options.submissions, lesson, options.roster, code)
    inside = options.out.resolve()
    kept, problems = [], [str(one) for one in found.problems if not _about(one.files, options.submissions, inside)]
    for one in found.submissions:
        if inside in one.path.resolve().parents:
            continue  # whatever lies in the results folder is no submission
        if rubric.lessons and one.lesson is not None and one.lesson not in rubric.lessons:
            problems.append(f"{one.id} is for lesson {one.lesson}, which the rubric does not have: not graded")
            continue
        kept.append(one)
    if not kept and options.gradescope is None:
        more = f" ({'; '.join(problems[:3])})" if problems else ""
        raise ValueError(f"no notebooks to grade in {options.submissions}{more}")
    return dataclasses.replace(found, submissions=tuple(kept)), problems


def _about(files: Sequence[str], root: Path, folder: Path) -> bool:
    """Whether all of these files are in this folder, or are it."""
    return bool(files) and all(folder in (path := (root / name).resolve(), *path.parents) for name in files)


def _settings(options: Options, secret: bytes, messages: Console) -> Settings:
    settings = Settings(
        secret=secret.hex(),
        sandbox=options.sandbox,
        required=options.required,
        paranoid=options.paranoid,
        trusted=options.trusted,
        limits=options.limits,
        worker=options.worker,
    )
    if options.scheduler is not None or options.worker != batch.WORKER:
        return settings
    level = sandbox.choose(options.sandbox, options.required)
    if level == "P0" and not options.trusted:
        raise ValueError(
            "no sandbox works here (condiff-grade --probe says what is missing), so that a submission could read your "
            "files; --trust-submissions grades all the same"
        )
    messages.print(f"isolation: {level}")
    return dataclasses.replace(settings, sandbox=level, probed=True)


def _plan(found: discover.Found, settings: Settings, options: Options) -> Plan:
    """Hash all files; nothing is parsed."""
    versions = dict(batch.versions())
    secret = batch.secret_id(settings.secret)
    keys, submissions, broken = {}, {}, []
    for one in found.submissions:
        ids = {exercise.partition(".")[0] for exercise in options.only}
        if ids and one.lesson is not None and one.lesson not in ids:
            continue
        submissions[one.id] = one
        try:
            sha256 = _hash(one)
        except Unreadable as error:
            task = Task(one.id, one.student, one.lesson, shown(one), "", options.only or None, one.notes)
            status = "grader error" if error.ours else "unreadable"
            broken.append(batch.without_judge(task, one.lesson, status, str(error)))
            continue
        keys[one.id] = Key(one.id, sha256, versions["exercises"], versions["grader"], secret)
    return Plan(keys, submissions, broken)


def _hash(submission: discover.Submission) -> str:
    found = hashlib.sha256()
    for chunk in entry(submission).chunks():
        found.update(chunk)
    return found.hexdigest()


def entry(submission: discover.Submission) -> Entry:
    """Where its bytes are."""
    name = submission.member or submission.path.name
    return Entry(tuple(name.split("/")), submission.path, submission.member)


def shown(submission: discover.Submission) -> str:
    """Its file, as reports name it."""
    return f"{submission.path.name}/{submission.member}" if submission.member else submission.path.name


def _tasks(plan: Plan, ledger: Ledger, options: Options) -> list[Task]:
    tasks = []
    for id, key in sorted(plan.keys.items()):
        one = plan.submissions[id]
        known = ledger.get(key)
        lesson = one.lesson or (known.lesson if known else None)
        wanted = _wanted(lesson, options.only)
        if ledger.done(key, wanted):
            continue
        todo = ledger.todo(key, wanted)
        only = todo if lesson and todo != tuple(e.id for e in exercises_of(lesson)) else options.only or None
        tasks.append(Task(id, one.student, one.lesson, shown(one), key.sha256, only, one.notes))
    return sorted(tasks, key=lambda task: (task.lesson or "", task.submission))  # a sandbox is for one lesson


def _wanted(lesson: str | None, only: Sequence[str]) -> tuple[str, ...]:
    known = exercises_of(lesson) if lesson in all_lessons() else ()
    return tuple(exercise.id for exercise in known if not only or exercise.id in only)


# --- grade ------------------------------------------------------------------------------------------------------------


def engine(settings: Settings, options: Options) -> AbstractContextManager[Engine]:
    """This machine, or the cluster."""
    if options.scheduler is None:
        return batch.Local(settings, options.workers)
    try:
        from .cluster import Cluster
    except ImportError as error:
        raise ImportError(f"--scheduler needs Dask: pip install 'condiff[cluster]' ({error})") from error
    return Cluster(settings, options.scheduler)


def _run(
    tasks: Sequence[Task], plan: Plan, ledger: Ledger, settings: Settings, options: Options, messages: Console
) -> None:
    lessons = {task.lesson for task in tasks if task.lesson}
    before = ledger.last()
    with engine(settings, options) as grader:
        if options.self_check:
            _self_check(grader, lessons, options, "before", messages)
        try:
            with progress(messages, options.quiet) as bar:
                line = bar.add_task("grading", total=len(tasks))
                for graded in grader.run(tasks, lambda task: read(plan.submissions[task.submission])):
                    ledger.put(plan.keys[graded.submission], graded)
                    lessons |= {graded.lesson} - {""}
                    bar.advance(line)
        finally:
            messages.print(f"{ledger.last() - before} of {len(tasks)} graded")
        if options.self_check:
            try:
                _self_check(grader, lessons, options, "after", messages)
            except BatchError:
                ledger.forget(before)
                raise


def _self_check(grader: Engine, lessons: Iterable[str], options: Options, when: str, messages: Console) -> None:
    problems = selfcheck.check_grader(grader, sorted(lessons), options.only or None)
    for problem in problems:
        messages.print(problem, markup=False, soft_wrap=True)
    if problems:
        raise BatchError(
            f"the grader does not judge known answers as it must ({len(problems)} above, {when} the batch): nothing is "
            "exported; --no-self-check does without this check"
        )


def read(submission: discover.Submission) -> bytes:
    """Its bytes, all at once."""
    return b"".join(entry(submission).chunks())


def progress(messages: Console, quiet: bool) -> Progress:
    """A bar with throughput and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=messages, disable=quiet)


class _Speed(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        """Submissions a second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


def _collect(plan: Plan, ledger: Ledger, options: Options) -> list[Graded]:
    """What the ledger has on the submissions that are here, under the names that they have now."""
    found = list(plan.broken)
    for id, key in plan.keys.items():
        if (known := ledger.get(key)) is None:
            continue
        one = plan.submissions[id]
        verdicts = tuple(v for v in known.verdicts if not options.only or v.exercise in options.only)
        found.append(dataclasses.replace(known, student=one.student, file=shown(one), verdicts=verdicts))
    return found


# --- after ------------------------------------------------------------------------------------------------------------


def _times(rubric: Rubric, submissions: Mapping[str, discover.Submission], folder: Path) -> dict[str, datetime]:
    if rubric.submitted == "file times":
        loose = {id: one for id, one in submissions.items() if one.member is None}
        return {id: datetime.fromtimestamp(one.path.stat().st_mtime, UTC) for id, one in loose.items()}
    if rubric.submitted != "metadata":
        return {}
    known = metadata_times(folder)
    parts = {id: {*one.path.parts, *(one.member or "").split("/")} for id, one in submissions.items()}
    return {id: time for id, names in parts.items() for name, time in known.items() if name in names}


def _write(
    scored: Sequence[Scored], problems: Sequence[str], found: discover.Found, rubric: Rubric, options: Options
) -> None:
    tables.write_tables(scored, options.out)
    report_html.write_pages(scored, options.out, problems)
    lines = "".join(as_json(one) + "\n" for one in scored)
    tables.write_atomically(options.out / "results.jsonl", lines)
    if options.anonymise:
        path = options.out / "names.csv"
        tables.write_atomically(path, tables.to_csv([("code", "student"), *sorted(found.names.items())]))
        path.chmod(0o600)
    if options.gradescope is not None:
        source = _source(found.submissions[0]) if len(found.submissions) == 1 else ""
        gradescope.write_results(scored, options.gradescope, visibility=options.visibility, source=source)
    if options.nbgrader is not None:
        from . import nbgrader_scores

        url = options.nbgrader if "://" in options.nbgrader else f"sqlite:///{options.nbgrader}"
        extra = {id for id, worth in rubric.exercises.items() if worth.extra}
        nbgrader_scores.write_gradebook(scored, url, extra=extra)


def _source(submission: discover.Submission) -> str:
    try:
        return "\n".join(cell.source for cell in read_limited(entry(submission).chunks()).cells)
    except Unreadable:
        return ""


def as_json(scored: Scored) -> str:
    """Everything about a submission in one line."""
    whole = dataclasses.asdict(scored.graded)
    points = [(one.points, one.out_of, one.override) for one in scored.verdicts]
    for verdict, (got, out_of, override) in zip(whole["verdicts"], points, strict=True):
        verdict |= dict(points=got, out_of=out_of, override=override)
    whole |= dict(points=scored.points, out_of=scored.out_of, late=scored.late, late_note=scored.late_note)
    return json.dumps(whole, allow_nan=False)


def _needs_a_look(scored: Scored) -> bool:
    """What is not final, or could not be read, unless the instructor has settled all of that."""
    if not scored.verdicts:
        return scored.graded.status != "graded"
    return any(v.verdict.outcome in ("grader error", "unreadable") and not v.override for v in scored.verdicts)


def _show(
    scored: Sequence[Scored],
    problems: Sequence[str],
    missing: Sequence[str],
    options: Options,
    messages: Console,
    results: Console,
) -> None:
    if options.json:
        for one in scored:
            print(as_json(one), flush=True)
    elif not options.quiet:
        results.print(tables.table(scored))
    for problem in problems:
        messages.print(f"to look at: {problem}", markup=False, soft_wrap=True)
    for one in scored:
        if _needs_a_look(one):
            why = "; ".join(one.graded.notes) or next((v.verdict.reason for v in one.verdicts if v.verdict.reason), "")
            text = f"to look at: {one.graded.submission}: {one.graded.status}: {why}"
            messages.print(feedback.one_line(text, 300), markup=False, soft_wrap=True)
    if missing:
        messages.print(f"nothing from: {', '.join(missing)}", markup=False, soft_wrap=True)
    messages.print(f"the results are in {options.out}: begin with index.html", markup=False, soft_wrap=True)


# --- other commands ---------------------------------------------------------------------------------------------------


def probe(results: Console) -> None:
    """Show what each level promises and whether it holds here, from the highest down to the first that does."""
    for level in sandbox.LEVELS[::-1]:
        results.print(f"[bold]{level}[/]")
        found = sandbox.probe(level).values()
        for one in found:
            results.print("[green]yes[/]" if one.works else "[red]no[/] ", end=" ")
            results.print(one.name + (f": {one.detail}" if not one.works else ""), markup=False, soft_wrap=True)
        if all(one.works for one in found):
            results.print(f"--sandbox auto uses {level} here")
            return


def make_gradescope(
    folder: Path,
    lesson: str | None,
    rubric: Path | None,
    secret: Path | None,
    require: str,
    visibility: str,
    messages: Console,
) -> None:
    """Write an autograder for one lesson."""
    if lesson is None:
        raise ValueError("--make-gradescope needs --lesson, such as --lesson 04")
    if rubric is not None:
        read_rubric(rubric)
    root = Path(__file__).parents[2]
    package = root if (root / "pyproject.toml").exists() else f"condiff=={metadata.version('condiff')}"
    drawn = read_secret(secret) if secret else secrets.token_hex(32).encode()
    done = gradescope.write_autograder(
        folder, package, lesson, secret=drawn, rubric=rubric, require=require, visibility=visibility
    )
    messages.print(f"upload {done} to Gradescope; {folder / 'README.md'} says how", markup=False, soft_wrap=True)

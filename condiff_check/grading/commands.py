"""What condiff-grade does, step by step: find, grade what the ledger does not have, score, write."""

import dataclasses
import hashlib
import json
import os
import secrets
from collections import Counter
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
from .listing import Entry, Problem
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
    new_secret: bool = False
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
        secret = _secret(options, ledger)
        found, problems = _find(options, rubric, secret)
        if options.anonymise:
            rubric = rubric.renamed(_codes(found))
        settings = _settings(options, secret, messages)
        plan = _plan(found, settings, options)
        for exercise in options.regrade:
            messages.print(f"exercise {exercise}: {ledger.regrade(exercise, plan.keys.values())} to grade again")
        tasks = _tasks(plan, ledger, options)
        for line in (*_again(tasks, plan, ledger), *_kept(tasks, plan, ledger, settings, options)):
            messages.print(line, markup=False, soft_wrap=True)
        if tasks:
            _run(tasks, plan, ledger, settings, options, messages)
        elif plan.submissions:
            messages.print("all of it is graded already; writing the results again")
        graded = _collect(plan, ledger, options)
        if part := sum(_partial(one) for one in graded):
            messages.print(f"not all exercises of {part} submissions are graded yet: their points are of the others")
        times = _times(rubric, plan.submissions, options.submissions)
        scored = [rubric.score(one, times.get(one.submission)) for one in batch.identical(graded)]
        problems += [f"the rubric's override for {each} hits nothing" for each in rubric.unused(graded)]
        _write(scored, problems, found, plan, rubric, options)
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


def _secret(options: Options, ledger: Ledger) -> bytes:
    """The folder's secret. With another one than before all would be graded anew, which is asked for or a slip."""
    path = options.secret or options.out / "secret"
    if options.new_secret and options.secret is None and path.exists():
        path.replace(path.with_name(f"secret.{batch.secret_id(read_secret(path).hex())}"))
    known = ledger.secret()
    if known is not None and not options.new_secret:
        there = path.exists() or options.secret is not None
        if not there or batch.secret_id(read_secret(path).hex()) != known:
            raise ValueError(
                f"{options.out} was graded with another secret than {path if there else 'a new one'}: give its file "
                "with --secret FILE, or draw new inputs and grade all of it anew with --new-secret"
            )
    return read_secret(path, make=options.secret is None)


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
    found = dataclasses.replace(
        found, problems=tuple(one for one in found.problems if not _about(one.files, options.submissions, inside))
    )
    kept, problems = [], [_nameless(one) if options.anonymise else str(one) for one in found.problems]
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


def _nameless(problem: Problem) -> str:
    """Without its files, whose names are names of students."""
    if not problem.files:
        return problem.message
    whose = f" of {problem.student}" if problem.student else ""
    count = f"{len(problem.files)} {'file' if len(problem.files) == 1 else 'files'}"
    return f"{problem.message}: {count}{whose}, which names.csv tells"


def _codes(found: discover.Found) -> dict[str, str]:
    """The codes of students and submissions by the names that they have without --anonymise."""
    codes = {}
    for code, owner in found.names.items():
        for name in (owner, discover.ident(owner)):
            codes[name] = code
            codes |= {f"{name}-{lesson}": f"{code}-{lesson}" for lesson in (*all_lessons(), "none")}
    return codes


def _names(found: discover.Found) -> list[tuple[str, str, str]]:
    """Who is who, with the files: the rows of names.csv, which stays with the instructor."""
    files: dict[str, list[str]] = {code: [] for code in found.names}
    for one in found.submissions:
        files.setdefault(one.student, []).append(one.member or str(one.path))
    for problem in found.problems:
        files.setdefault(problem.student or "", []).extend(problem.files)
    return [(code, found.names.get(code, ""), ", ".join(theirs)) for code, theirs in sorted(files.items())]


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
    if level == "P0" and not options.trusted and options.sandbox == "P0":
        raise ValueError("--sandbox P0 lets a submission read your files: it needs --trust-submissions as well")
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
    grader = versions["grader"] + _limits(settings.limits)
    keys, submissions, broken = {}, {}, []
    for one in found.submissions:
        submissions[one.id] = one
        try:
            sha256 = _hash(one)
        except Unreadable as error:
            task = Task(one.id, one.student, one.lesson, shown(one, options.anonymise), "", None, one.notes)
            status = "grader error" if error.ours else "unreadable"
            broken.append(batch.without_judge(task, one.lesson, status, str(error)))
            continue
        keys[one.id] = Key(one.id, sha256, versions["exercises"], grader, secret)
    return Plan(keys, submissions, broken)


def _limits(given: Mapping[str, float]) -> str:
    """Limits other than the usual ones, which belong to the grader as far as the ledger is concerned."""
    usual = dataclasses.asdict(sandbox.Limits())
    return "".join(f" {name}={value:g}" for name, value in sorted(given.items()) if value != usual[name])


def _hash(submission: discover.Submission) -> str:
    found = hashlib.sha256()
    for chunk in entry(submission).chunks():
        found.update(chunk)
    return found.hexdigest()


def entry(submission: discover.Submission) -> Entry:
    """Where its bytes are."""
    name = submission.member or submission.path.name
    return Entry(tuple(name.split("/")), submission.path, submission.member)


def shown(submission: discover.Submission, anonymous: bool = False) -> str:
    """Its file, as reports name it."""
    if anonymous:
        return f"{submission.id}.ipynb"
    return f"{submission.path.name}/{submission.member}" if submission.member else submission.path.name


def _tasks(plan: Plan, ledger: Ledger, options: Options) -> list[Task]:
    tasks = []
    for id, key in sorted(plan.keys.items()):
        one = plan.submissions[id]
        known = ledger.get(key)
        lesson = one.lesson or (known.lesson if known else None)
        wanted = _wanted(lesson, options.only)
        if (options.only and lesson and not wanted) or ledger.done(key, wanted):
            continue
        todo = ledger.todo(key, wanted)
        only = todo if lesson and todo != tuple(e.id for e in exercises_of(lesson)) else options.only or None
        tasks.append(Task(id, one.student, one.lesson, shown(one, options.anonymise), key.sha256, only, one.notes))
    return sorted(tasks, key=lambda task: (task.lesson or "", task.submission))  # a sandbox is for one lesson


def _wanted(lesson: str | None, only: Sequence[str]) -> tuple[str, ...]:
    known = exercises_of(lesson) if lesson in all_lessons() else ()
    return tuple(exercise.id for exercise in known if not only or exercise.id in only)


def _again(tasks: Sequence[Task], plan: Plan, ledger: Ledger) -> list[str]:
    """Why what was graded before is graded again, and how many."""
    why: Counter[str] = Counter()
    for task in tasks:
        key = plan.keys[task.submission]
        if (old := ledger.before(key)) is not None:
            why[_changed(old, key)] += 1
        elif (known := ledger.get(key)) and known.status == "grader error":
            why["the grader failed on them"] += 1
    return [f"{count} graded before are graded again: {reason}" for reason, count in sorted(why.items())]


def _changed(old: Key, new: Key) -> str:
    """What is another one than before, in words."""
    (grader, _, limits), (now, _, due) = old.grader.partition(" "), new.grader.partition(" ")
    reasons = [
        (old.exercises != new.exercises, "the exercises of the course are others"),
        (grader != now, "the grader is another version"),
        (limits != due, "the limits of time are others"),
        (old.secret != new.secret, "the secret is another one"),
    ]
    return ", ".join(text for holds, text in reasons if holds)


def _kept(tasks: Sequence[Task], plan: Plan, ledger: Ledger, settings: Settings, options: Options) -> list[str]:
    """What of the command line does not hold for what is graded already."""
    due = {task.submission for task in tasks}
    known = [found for id, key in plan.keys.items() if id not in due and (found := ledger.get(key)) and found.level]
    again = "for them too take a fresh folder for the results, or --regrade"
    lines = []
    if settings.probed and (others := sum(one.level != settings.sandbox for one in known)):
        levels = ", ".join(sorted({one.level for one in known if one.level != settings.sandbox}))
        lines.append(f"{others} are graded already, at {levels}, and stay as they are; {again}")
    less = sum(one.level < (options.required or "") for one in known)  # P0, L1, L2
    if less and not settings.probed:
        lines.append(f"{less} are graded already with less than {options.required}, and stay as they are; {again}")
    if options.paranoid and known:
        lines.append(f"{len(known)} are graded already, and --paranoid makes no difference to them; {again}")
    return lines


def _partial(graded: Graded) -> bool:
    """Whether exercises of its lesson are still to be graded."""
    return graded.status == "graded" and len(graded.verdicts) < len(_wanted(graded.lesson, ()))


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
        if options.scheduler is not None:
            _show_levels(tasks, plan, ledger, messages)
        if options.self_check:
            try:
                _self_check(grader, lessons, options, "after", messages)
            except BatchError:
                ledger.forget(before)
                raise


def _show_levels(tasks: Sequence[Task], plan: Plan, ledger: Ledger, messages: Console) -> None:
    """The isolation that each machine of a cluster has found for itself."""
    found = [ledger.get(plan.keys[task.submission]) for task in tasks]
    levels = Counter(one.level or "not run" for one in found if one)
    messages.print(f"isolation: {', '.join(f'{level} ({count})' for level, count in sorted(levels.items()))}")


def _self_check(grader: Engine, lessons: Iterable[str], options: Options, when: str, messages: Console) -> None:
    if lessons := sorted(lessons):
        what = f"{'lesson' if len(lessons) == 1 else 'lessons'} {', '.join(lessons)}"
        messages.print(f"trying the grader on known answers to {what}, {when} the class; this may take a minute")
    problems = selfcheck.check_grader(grader, lessons, options.only or None)
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
        found.append(dataclasses.replace(known, student=one.student, file=shown(one, options.anonymise)))
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
    scored: Sequence[Scored],
    problems: Sequence[str],
    found: discover.Found,
    plan: Plan,
    rubric: Rubric,
    options: Options,
) -> None:
    tables.write_tables(scored, options.out)
    report_html.write_pages(scored, options.out, problems, _sources(scored, plan))
    lines = "".join(as_json(one) + "\n" for one in scored)
    tables.write_atomically(options.out / "results.jsonl", lines)
    if options.anonymise:
        path = options.out / "names.csv"
        tables.write_atomically(path, tables.to_csv([("code", "student", "files"), *_names(found)]))
        path.chmod(0o600)
    if options.gradescope is not None:
        source = _source(found.submissions[0]) if len(found.submissions) == 1 else ""
        gradescope.write_results(scored, options.gradescope, visibility=options.visibility, source=source)
    if options.nbgrader is not None:
        from . import nbgrader_scores

        url = options.nbgrader if "://" in options.nbgrader else f"sqlite:///{options.nbgrader}"
        extra = {id for id, worth in rubric.exercises.items() if worth.extra}
        nbgrader_scores.write_gradebook(scored, url, extra=extra)


def _sources(scored: Sequence[Scored], plan: Plan) -> dict[str, str]:
    """The code of those whose pages quote a line of it; it is read again, as the ledger does not keep it."""
    raised = (one.graded.submission for one in scored if any(v.verdict.outcome == "raised" for v in one.verdicts))
    return {id: _source(plan.submissions[id]) for id in raised if id in plan.submissions}


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
            failed = (v.verdict for v in one.verdicts if v.verdict.outcome in ("grader error", "unreadable"))
            why = next((verdict.reason for verdict in failed if verdict.reason), "") or "; ".join(one.graded.notes)
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
    root = Path(__file__).parents[2]
    package = root if (root / "pyproject.toml").exists() else f"condiff=={metadata.version('condiff')}"
    drawn = read_secret(secret) if secret else secrets.token_hex(32).encode()
    done = gradescope.write_autograder(
        folder, package, lesson, secret=drawn, rubric=rubric, require=require, visibility=visibility
    )
    messages.print(f"upload {done} to Gradescope; {folder / 'README.md'} says how", markup=False, soft_wrap=True)

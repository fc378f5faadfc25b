"""The judge: runs a submission's cells in a sandbox, then tries every exercise's facts on what they defined."""

import ast
import contextlib
import hmac
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Generator

from ..agent.runner import KEPT
from ..agent.wire import Ended, Late, TooMany, Violation, Wire, WireError
from ..checking import explain
from ..checking import judge as try_facts
from ..exercise import Answer, Exercise, Fact, Wrong
from ..invariants import UNTOUCHED
from ..registry import lesson as exercises_of
from ..report import NOT_DONE, RIGHT, WRONG, Report, Result
from .intake import Cell, Notebook
from .results import CellRun, FactResult, Verdict
from .sandbox import Child, Limits, Sandbox, SandboxError
from .session import Session, patience

SKIP = "skip-grading"
REPLAYS = 5  # cells that hang or end the process and are left out, one after the other
FORBIDDEN = "not available while grading"
ANSWERS = 5.0  # seconds that the agent may take to do what is no student's code
LONGEST = 2000  # characters of a message in a verdict
REASON = 300


@dataclass
class _Run:
    """A child whose cells have run: which cells define which name, and what became of the cells."""

    child: Child
    control: Wire
    defined: dict[str, list[int]] = field(default_factory=dict)
    told: dict[int, tuple[str, str]] = field(default_factory=dict)  # cell: state and note


class _Lost(Exception):
    """The child hung or ended: why, and in which cell."""

    def __init__(self, why: str, cell: int | None):
        super().__init__(why)
        self.why, self.cell = why, cell


class Judge:
    """Grades one submission after the other in one sandbox. `secret` draws the inputs, the same for everybody."""

    def __init__(self, sandbox: Sandbox, secret: bytes, limits: Limits | None = None):
        self._sandbox, self._secret, self._limits = sandbox, secret, limits or Limits()
        self.output = ""  # what the last submission printed

    def grade(
        self, notebook: Notebook, lesson: str, only: Sequence[str] | None = None
    ) -> tuple[list[Verdict], list[CellRun], list[str]]:
        """A verdict for each exercise of the lesson, what became of each cell, and notes about the notebook.

        Raises KeyError for a lesson without exercises, and sandbox.SandboxError where no child can be had.
        """
        exercises = [exercise for exercise in exercises_of(lesson) if only is None or exercise.id in only]
        attempt = _Attempt(self._sandbox, self._limits, notebook, exercises)
        try:
            verdicts = [self._exercise(attempt, exercise) for exercise in exercises]
        finally:
            attempt.close()
            self.output = attempt.output
        return verdicts, attempt.cells(), attempt.notes

    def seed(self, exercise: str) -> int:
        """What the inputs of an exercise are drawn from."""
        return int.from_bytes(hmac.digest(self._secret, exercise.encode(), "sha256")[:5], "big")

    def _exercise(self, attempt: "_Attempt", exercise: Exercise) -> Verdict:
        start = time.monotonic()
        notes = attempt.about(exercise)
        missing = attempt.missing(exercise)
        if missing:
            names = " and ".join(f"`{name}`" for name in missing)
            verb = "is" if len(missing) == 1 else "are"
            return _verdict(exercise, "missing", f"{names} {verb} not defined", notes=notes)
        earlier = attempt.definitions(exercise)
        for back in range(earlier):
            report, session, why = self._try(attempt, exercise, back)
            if report is None or report.status != NOT_DONE or back + 1 == earlier:
                break
            notes = (*notes, f"the last definition is not done: the one before it counts (number {earlier - back - 1})")
        seconds = time.monotonic() - start
        calls = session.peer.served if session else 0
        return _judged(exercise, report, session, why, notes, seconds, calls)

    def _try(
        self, attempt: "_Attempt", exercise: Exercise, back: int
    ) -> tuple[Report | None, Session | None, str | None]:
        """The report on a definition, and why the child ended, if it did."""
        session = None
        try:
            session = attempt.session(exercise)
            objects = session.objects(exercise.names, back)
            seed = self.seed(exercise.id)
            report = try_facts(exercise, objects, seed=seed, guarded=session.guard)
            report = _untouched(report, session)
            if session.ended is None:
                with contextlib.suppress(Exception):  # too odd to be explained: refused all the same
                    report = explain(report, objects, guarded=session.guard)
            return report, session, attempt.after(session)
        except WireError as error:
            return None, session, attempt.after(session) or _why(error)
        except _Lost as lost:
            return None, session, lost.why
        except SandboxError:
            raise
        except Exception:  # no submission ends the grading of the others
            return None, session, "grader error"
        finally:
            if session is not None:
                session.close()


class _Attempt:
    """The run of one notebook; again without the cells that spoil it, and when an exercise has ended the child."""

    def __init__(self, sandbox: Sandbox, limits: Limits, notebook: Notebook, exercises: Sequence[Exercise]):
        self._sandbox, self._limits, self._notebook = sandbox, limits, notebook
        self._names = sorted({name for exercise in exercises for name in exercise.names})
        self._spoilt: dict[int, tuple[str, str]] = {}
        self._wanted = [cell for cell in notebook.cells if SKIP not in cell.tags or _defines(cell, self._names)]
        self._run: _Run | None = None
        self._told: dict[int, tuple[str, str]] = {}
        self._output = ""
        self._deadline = time.monotonic()
        self.notes: list[str] = []
        self._start()

    # --- cells

    def _start(self) -> None:
        """Run the cells, leaving out one after the other those that hang or end the process."""
        for _ in range(REPLAYS + 1):
            run = None
            try:
                run = self._open()
                self._cells(run)
                self._run, self._told = run, {**self._told, **run.told}
                return
            except _Lost as lost:
                self._close(run)
                if lost.cell is None:
                    break
                self._spoilt[lost.cell] = (lost.why, _SPOILT.get(lost.why, ""))
            finally:
                self._told |= run.told if run else {}
        self.notes.append("the notebook could not be run to its end")
        self._run = None

    def _open(self) -> _Run:
        child = self._sandbox.spawn()
        return _Run(child, Wire(child.control, lambda: self._deadline))

    def _cells(self, run: _Run) -> None:
        cells = [cell for cell in self._wanted if cell.number not in self._spoilt]
        longer = patience()
        end = time.monotonic() + longer * self._limits.notebook_seconds
        self._deadline = min(end, time.monotonic() + longer * ANSWERS)
        running = None
        try:
            sources = [dict(number=cell.number, source=cell.source) for cell in cells]
            run.control.send(dict(op="run", cells=sources, names=self._names))
            while True:
                message, _ = run.control.receive()
                match message.get("op"):
                    case "running":
                        running = _number(message, cells)
                        self._deadline = min(end, time.monotonic() + longer * self._limits.cell_seconds)
                    case "ran":
                        note = _clean(message.get("note"))
                        run.told[_number(message, cells)] = ("raised" if note else "ran", note)
                        running = None
                        self._deadline = min(end, time.monotonic() + longer * ANSWERS)
                    case "done":
                        run.defined = _definitions(message.get("defined"), self._names, cells)
                        return
                    case _:
                        raise Violation("no report on a cell")
        except WireError as error:
            raise _Lost(self._reason(run.child, error), running) from error

    def _reason(self, child: Child, error: WireError) -> str:
        why = _why(error)
        if why != "died":
            return why
        return "memory" if _exit(child) == "memory" else why

    def cells(self) -> list[CellRun]:
        """What became of each code cell."""
        found = []
        for cell in self._notebook.cells:
            if cell not in self._wanted:
                found.append(CellRun(cell.number, cell.id, "skipped", "tagged skip-grading"))
                continue
            state, note = self._spoilt.get(cell.number) or self._told.get(cell.number, ("skipped", "not reached"))
            found.append(CellRun(cell.number, cell.id, state, note))
        return found

    # --- definitions

    def missing(self, exercise: Exercise) -> list[str]:
        return [name for name in exercise.names if not (self._run and self._run.defined.get(name))]

    def definitions(self, exercise: Exercise) -> int:
        """How many there are of the name that has most."""
        return max(len(self._run.defined[name]) for name in exercise.names)

    def about(self, exercise: Exercise) -> tuple[str, ...]:
        """Where an exercise is defined more than once."""
        notes = []
        for name in exercise.names:
            cells = self._run.defined.get(name, []) if self._run else []
            if len(cells) > 1:
                listed = ", ".join(map(str, cells))
                notes.append(f"`{name}` is defined in cells {listed}: the last definition counts")
        return tuple(notes)

    # --- exercises

    def session(self, exercise: Exercise) -> Session:
        """A connection to a process that has run the cells and answers calls of this exercise. Raises _Lost."""
        for _ in range(2):
            if self._run is None:
                raise _Lost("died", None)
            try:
                return self._connect(exercise)
            except WireError as error:
                why = self._reason(self._run.child, error)
                self._close(self._run)
                self._start()
        raise _Lost(why, None)

    def _connect(self, exercise: Exercise) -> Session:
        run = self._run
        self._deadline = time.monotonic() + patience() * ANSWERS
        run.control.send(dict(op="serve"))
        _expect(run.control, "give")
        mine, theirs = socket.socketpair()
        try:
            socket.send_fds(run.child.control, [b"f"], [theirs.fileno()])
            _expect(run.control, "serving")
        except (OSError, WireError) as error:
            mine.close()
            raise error if isinstance(error, WireError) else Ended from error
        finally:
            theirs.close()
        return Session(mine, exercise.seconds)

    def after(self, session: Session | None) -> str | None:
        """Why a session ended before its time. Hanging up lets the other process end."""
        if session is None:
            return None
        session.close()
        if session.ended is None:
            return None
        why = _why(session.ended)
        if why == "died" and _exit(self._run.child, wait=0.2) == "memory":
            return "memory"
        return why

    def close(self) -> None:
        self._close(self._run)

    def _close(self, run: _Run | None) -> None:
        if run is not None:
            run.child.kill()
            self._output = run.child.output
            run.control.close()

    @property
    def output(self) -> str:
        return self._output


_SPOILT = {
    "timeout": "takes longer than a cell may; the other cells were run without it",
    "memory": "needs more memory than there is; the other cells were run without it",
    "died": "ends the process; the other cells were run without it",
    "protocol": "disturbs the grader's connection; the other cells were run without it",
}


def _defines(cell: Cell, names: Sequence[str]) -> bool:
    """Whether a cell that is tagged to be skipped holds an answer all the same."""
    try:
        body = ast.parse(cell.source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names for node in body)


def _number(message: dict, cells: Sequence[Cell]) -> int:
    number = message.get("number")
    if not any(cell.number == number for cell in cells):
        raise Violation("a report on an unknown cell")
    return number


def _definitions(told: object, names: Sequence[str], cells: Sequence[Cell]) -> dict[str, list[int]]:
    if not isinstance(told, dict):
        raise Violation("no list of definitions")
    known, found = {cell.number for cell in cells}, {}
    for name in names:
        numbers = told.get(name, [])
        if not isinstance(numbers, list) or len(numbers) > KEPT:
            raise Violation("no list of definitions")
        if not all(type(number) is int and number in known for number in numbers):
            raise Violation("a definition in an unknown cell")
        found[name] = numbers
    return found


def _expect(control: Wire, op: str) -> None:
    message, _ = control.receive()
    if message.get("op") != op:
        raise Violation(f"{op} was due")


def _why(error: WireError | None) -> str:
    match error:
        case Late():
            return "timeout"
        case Ended():
            return "died"
        case TooMany():
            return "wrong"
    return "protocol"


def _exit(child: Child, wait: float = 0.5) -> str | None:
    """How the child ended, if it has within so many seconds."""
    end = time.monotonic() + wait
    while (found := child.exit()) is None and time.monotonic() < end:
        time.sleep(0.01)
    return found


def _untouched(report: Report, session: Session) -> Report:
    """No answer is right because it made the judge's things agree with it: facts may compute what is due from what they
    have handed over. The fact that sees to this tries some of the calls only."""
    exercise = report.exercise
    altered = sorted(session.peer.altered & _kept(exercise))
    if report.status != RIGHT or not altered:
        return report
    failed = Result(Fact(UNTOUCHED, _never), "fails", f"you changed {' and '.join(altered)}: the caller still needs it")
    results = tuple(result for result in report.results if result.fact.name != UNTOUCHED)
    return replace(report, status=WRONG, results=(*results, failed))


def _kept(exercise: Exercise) -> set[str]:
    """What a right answer leaves as it was; no exercise asks for a change of a tensor that it hands over."""
    if not exercise.universal or (exercise.kind == "training" and exercise.changes):
        return {"an argument"}
    if exercise.changes:
        return {"an argument", "a parameter"}
    return {"an argument", "a parameter", "the mode of a module"}


def _never(answer: Answer, generator: Generator) -> None:
    raise Wrong("tried in all calls")


# --- verdicts ---------------------------------------------------------------------------------------------------------

REASONS = {
    "timeout": "it needs longer than it may: is there an endless loop?",
    "memory": "it needs more memory than there is",
    "died": "the process ended while it ran",
    "protocol": "what came back is no answer",
    "wrong": "it calls what it is given too often",
    "not done": "not done: the body is raise NotImplementedError",
    "grader error": "the grader could not handle what came back: somebody has to look",
}


def _judged(
    exercise: Exercise,
    report: Report | None,
    session: Session | None,
    why: str | None,
    notes: tuple[str, ...],
    seconds: float,
    calls: int,
) -> Verdict:
    if report is None:
        outcome = why or "died"
        return _verdict(exercise, outcome, REASONS[outcome], notes=notes, seconds=seconds, calls=calls)
    facts = tuple(FactResult(result.fact.name, result.state, _clean(result.message)) for result in report.results)
    outcome = _outcome(report, why)
    mistake = next((m.name for m in exercise.mistakes if m.diagnosis == report.diagnosis), None)
    return _verdict(
        exercise,
        outcome,
        "" if outcome == "right" else _reason(report, outcome),
        facts=facts,
        formulas=tuple(_clean(formula) for formula in report.formulas),
        mistake=mistake,
        diagnosis=report.diagnosis,
        relation=report.relation and _clean(report.relation),
        notes=notes,
        seconds=seconds,
        calls=calls,
    )


def _outcome(report: Report, why: str | None) -> str:
    if why is not None and report.status != RIGHT:
        return why
    if report.status == RIGHT:
        return "right"
    if report.status == NOT_DONE:
        return "not done"
    if any(FORBIDDEN in result.message for result in report.results):
        return "forbidden"
    return "raised" if report.first and report.first.state == "raises" else "wrong"


def _reason(report: Report, outcome: str) -> str:
    if outcome in REASONS and outcome != "wrong":
        return REASONS[outcome]
    first = report.first
    if first is None:
        return outcome
    told = _clean(first.message).partition("\n")[0]
    return (f"{first.fact.name}: {told}" if told else first.fact.name)[:REASON]


def _verdict(exercise: Exercise, outcome: str, reason: str, **more: object) -> Verdict:
    points = float(exercise.points) if outcome == "right" else 0.0
    return Verdict(exercise.id, exercise.names, outcome, points, float(exercise.points), reason, **more)


def _clean(text: object) -> str:
    """Without control characters, those that turn the direction of writing included, and no longer than it may be."""
    if not isinstance(text, str):
        return ""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text[: 4 * LONGEST])
    kept = "".join(c for c in text if c in "\n\t" or (c.isprintable() and c not in _TURNING))
    return kept[:LONGEST]


_TURNING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

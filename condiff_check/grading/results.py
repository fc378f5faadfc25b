"""What grading finds out, as plain data: one Graded per submission, with one Verdict per exercise."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

OUTCOMES = (
    "right",  # every fact holds
    "wrong",  # a fact does not hold
    "raised",  # the student's code raised while a fact was tried
    "not done",  # the body still says raise NotImplementedError
    "missing",  # the name is not defined after all cells
    "timeout",
    "memory",
    "died",  # the process ended: os._exit, a segmentation fault
    "protocol",  # what came over the wire is no answer
    "forbidden",  # it asked condiff_ref for what the exercise asks for
    "unreadable",  # the file is no notebook
    "grader error",  # ours: never counted as 0 without somebody looking
)


@dataclass(frozen=True)
class FactResult:
    """How one fact came out: "holds", "fails", "raises", "not reached" or "not done"."""

    name: str
    state: str
    message: str = ""


@dataclass(frozen=True)
class Verdict:
    """One exercise of one submission. `points` of `out_of` as the exercise has them; a rubric may say otherwise.

    reason: one line for every outcome but "right". diagnosis, mistake, formulas, relation: as check() tells them, the
    name of the mistake beside them for counting. `notes`: about definitions, such as "defined in cells 4 and 9; the
    last one counts".
    """

    exercise: str
    names: tuple[str, ...]
    outcome: str
    points: float
    out_of: float
    reason: str = ""
    facts: tuple[FactResult, ...] = ()
    formulas: tuple[str, ...] = ()
    mistake: str | None = None
    diagnosis: str | None = None
    relation: str | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class CellRun:
    """What became of one code cell: "ran", "raised", "timeout", "memory", "died" or "skipped"."""

    number: int
    id: str
    state: str
    note: str = ""


@dataclass(frozen=True)
class Graded:
    """One submission, graded. Times aside, the same bytes with the same secret give the same Graded.

    status: "graded", "unreadable" or "grader error". level and layers: the isolation that was on, as probed.
    versions: of the course, the exercises (a hash), Python and torch. key: which secret drew the inputs.
    """

    submission: str
    student: str
    lesson: str
    file: str
    sha256: str
    status: str
    verdicts: tuple[Verdict, ...] = ()
    cells: tuple[CellRun, ...] = ()
    notes: tuple[str, ...] = ()
    output: str = ""
    level: str = ""
    layers: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    key: str = ""
    identical_to: tuple[str, ...] = ()
    seconds: float = 0.0
    graded_at: str = ""

    @property
    def points(self) -> float:
        return sum(verdict.points for verdict in self.verdicts)

    @property
    def out_of(self) -> float:
        return sum(verdict.out_of for verdict in self.verdicts)


TIMES = ("seconds", "graded_at")  # the fields that may differ between two runs


def to_json(graded: Graded) -> str:
    """One line of JSON, keys in the order of the fields."""
    return json.dumps(dataclasses.asdict(graded), ensure_ascii=True, allow_nan=False)


def from_json(text: str) -> Graded:
    """The Graded again. Raises ValueError or TypeError for what to_json did not write."""
    data = json.loads(text)
    verdicts = tuple(_verdict(item) for item in data.pop("verdicts"))
    cells = tuple(CellRun(**item) for item in data.pop("cells"))
    versions = tuple((name, version) for name, version in data.pop("versions"))
    return Graded(**_tuples(data), verdicts=verdicts, cells=cells, versions=versions)


def _verdict(data: dict[str, Any]) -> Verdict:
    facts = tuple(FactResult(**item) for item in data.pop("facts"))
    return Verdict(**_tuples(data), facts=facts)


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}

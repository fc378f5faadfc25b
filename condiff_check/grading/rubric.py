"""Points: the exercises' own, or an instructor's rubric file with extra points, a deadline and overrides.

A rubric is YAML:

    title: Guidance, week 4
    lessons: [04]                       # or lesson: 04; nothing else is scored then
    exercises:                          # others keep their own points
      04.1: 2
      04.2: {points: 3, extra: true}    # on top: not part of the maximum
    deadline: 2031-05-02T23:59+02:00
    late: {per_day: 10%, at_most: 50%, grace: 15 minutes}   # of the points earned, for each day begun
    submitted: times.csv                # columns submission or student, and time; or metadata; or file times
    overrides:
      - {student: kim, exercise: 04.2, points: 3, comment: explained at the blackboard}
"""

import csv
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import yaml

from .intake import MB, Unreadable
from .listing import Problem, entries
from .results import Graded, Verdict

KEYS = ("title", "lesson", "lessons", "exercises", "deadline", "late", "submitted", "overrides")
LATE_KEYS = ("per_day", "at_most", "grace")
OVERRIDE_KEYS = ("submission", "student", "exercise", "points", "comment")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
METADATA = "submission_metadata.yml"  # beside the submissions in an export of Gradescope


@dataclass(frozen=True)
class ScoredVerdict:
    """A verdict with the points that it is worth here. `override` is the instructor's comment."""

    verdict: Verdict
    points: float
    out_of: float
    override: str = ""


@dataclass(frozen=True)
class Scored:
    """A graded submission with its points; `late` is what came off for lateness.

    A verdict "grader error" counts neither in `points` nor in `out_of`, until an override settles it; extra points
    count in `points` alone.
    """

    graded: Graded
    verdicts: tuple[ScoredVerdict, ...]
    late: float
    late_note: str
    points: float
    out_of: float


class RubricError(ValueError):
    """The rubric cannot be used; the message names file, line and key, and what is allowed there."""


@dataclass(frozen=True)
class Worth:
    """What an exercise counts."""

    points: float
    extra: bool = False


@dataclass(frozen=True)
class Late:
    """Shares of the points earned: `per_day` for each day begun after `grace`, together `at_most`."""

    per_day: float
    at_most: float = 1.0
    grace: timedelta = timedelta()


@dataclass(frozen=True)
class Override:
    """The instructor's own points for one exercise of a submission, or of a student."""

    who: str
    exercise: str
    points: float
    comment: str


@dataclass(frozen=True)
class Rubric:
    """How verdicts become points. Without a file: as the exercises say.

    submitted: "", "metadata", "file times", or the name of the CSV file that `times` were read from, by submission or
    by student.
    """

    title: str = ""
    lessons: tuple[str, ...] = ()
    exercises: Mapping[str, Worth] = field(default_factory=dict)
    deadline: datetime | None = None
    late: Late | None = None
    submitted: str = ""
    times: Mapping[str, datetime] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def score(self, graded: Graded, submitted: datetime | None = None) -> Scored:
        """Points of a submission that was handed in at `submitted`; the rubric's own list of times goes before."""
        verdicts = tuple(self._score(graded, verdict) for verdict in graded.verdicts)
        counted = [one for one in verdicts if one.verdict.outcome != "grader error" or one.override]
        earned = _tidy(sum(one.points for one in counted))
        out_of = _tidy(sum(one.out_of for one in counted if not self._extra(one.verdict.exercise)))
        time = self.times.get(graded.submission) or self.times.get(graded.student) or submitted
        late, note = self._late(earned, time)
        return Scored(graded, verdicts, late, note, _tidy(earned - late), out_of)

    def renamed(self, names: Mapping[str, str]) -> "Rubric":
        """With other names for students and submissions, as --anonymise gives them; who is not listed stays."""
        times = {names.get(who, who): time for who, time in self.times.items()}
        overrides = tuple(replace(one, who=names.get(one.who, one.who)) for one in self.overrides)
        return replace(self, times=times, overrides=overrides)

    def unused(self, graded: Iterable[Graded]) -> list[str]:
        """Overrides that hit nothing: a name with a slip in it, most likely."""
        seen = {(who, v.exercise) for one in graded for v in one.verdicts for who in (one.submission, one.student)}
        return [f"{one.who}, exercise {one.exercise}" for one in self.overrides if (one.who, one.exercise) not in seen]

    def _score(self, graded: Graded, verdict: Verdict) -> ScoredVerdict:
        worth = self.exercises.get(verdict.exercise, Worth(verdict.out_of))
        for override in self.overrides:
            if override.exercise == verdict.exercise and override.who in (graded.submission, graded.student):
                return ScoredVerdict(verdict, override.points, worth.points, override.comment)
        share = verdict.points / verdict.out_of if verdict.out_of else 0.0
        return ScoredVerdict(verdict, _tidy(share * worth.points), worth.points)

    def _extra(self, exercise: str) -> bool:
        return exercise in self.exercises and self.exercises[exercise].extra

    def _late(self, earned: float, submitted: datetime | None) -> tuple[float, str]:
        if self.deadline is None or self.late is None:
            return 0.0, ""
        if submitted is None:
            return 0.0, "handed in at an unknown time: counted as in time"
        if submitted.tzinfo is None:
            submitted = submitted.replace(tzinfo=self.deadline.tzinfo)
        over = submitted - self.deadline
        if over <= self.late.grace:
            return 0.0, ""
        days = math.ceil(over / timedelta(days=1))
        share = min(days * self.late.per_day, self.late.at_most)
        return _tidy(share * earned), f"late, day {days}: {share:.0%} off"


def read_rubric(path: Path, known: Mapping[str, float] | None = None) -> Rubric:
    """The rubric in a file. `known` are the exercises with their points; by default those of the course.

    Raises RubricError for whatever is not as it should be.
    """
    if known is None:
        from ..registry import exercises

        known = {exercise.id: float(exercise.points) for exercise in exercises()}
    return _Reader(path, known).rubric()


class _Reader:
    """Reads one file. All scalars are text, so that 04.10 does not become the number 4.1."""

    def __init__(self, path: Path, known: Mapping[str, float]):
        self.path, self.known = path, known
        self.scope = "the course"
        self.lines: dict[str, int] = {}
        self.data = self._load()

    def rubric(self) -> Rubric:
        data = self._mapping("", self.data, KEYS)
        if "lesson" in data and "lessons" in data:
            raise self._error("lesson", "stands beside lessons: give one of them")
        lessons = self._lessons(data)
        if lessons:
            self.known = {id: points for id, points in self.known.items() if id.split(".")[0] in lessons}
            self.scope = f"lesson {', '.join(lessons)}"
        deadline = self._time("deadline", data["deadline"]) if "deadline" in data else None
        submitted = self._text("submitted", data["submitted"]) if "submitted" in data else ""
        return Rubric(
            title=self._text("title", data["title"]) if "title" in data else "",
            lessons=lessons,
            exercises=self._exercises(data.get("exercises", {})),
            deadline=deadline,
            late=self._late(data["late"], deadline) if "late" in data else None,
            submitted=submitted,
            times=dict(self._times(submitted, deadline)),
            overrides=tuple(self._overrides(data.get("overrides", []))),
        )

    def _load(self) -> object:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                node = yaml.compose(file, Loader=yaml.BaseLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            raise RubricError(f"{where}: this is not YAML: {error.problem or error.context}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RubricError(f"{self.path}: this is not YAML in UTF-8: {error}") from error
        except OSError as error:
            raise RubricError(f"{self.path}: {error.strerror or error}") from error
        return {} if node is None else self._plain("", node)

    def _plain(self, key: str, node: yaml.Node) -> object:
        """Text, lists and dicts; remembers in which line each key stands, and refuses one that stands twice."""
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if isinstance(node, yaml.SequenceNode):
            self.lines |= {_join(key, str(n)): item.start_mark.line + 1 for n, item in enumerate(node.value, 1)}
            return [self._plain(_join(key, str(n)), item) for n, item in enumerate(node.value, 1)]
        found: dict[str, object] = {}
        for name, value in node.value:
            inner = _join(key, str(name.value))
            if name.value in found:
                raise RubricError(f"{self.path}:{name.start_mark.line + 1}: {inner}: stands here twice")
            self.lines[inner] = name.start_mark.line + 1
            found[name.value] = self._plain(inner, value)
        return found

    # --- what stands where ---

    def _lessons(self, data: Mapping[str, object]) -> tuple[str, ...]:
        key = "lesson" if "lesson" in data else "lessons"
        given = data.get(key, [])
        given = given if isinstance(given, list) else [given]
        there = sorted({id.split(".")[0] for id in self.known})
        for lesson in given:
            if lesson not in there:
                raise self._error(key, f"there is no lesson {lesson!r}: there are {', '.join(there)}")
        return tuple(given)

    def _exercises(self, data: object) -> dict[str, Worth]:
        if not isinstance(data, dict):
            raise self._error("exercises", "is a mapping such as {04.1: 2, 04.2: {points: 3, extra: true}}")
        return {self._exercise(f"exercises.{id}", id): self._worth(f"exercises.{id}", data[id]) for id in data}

    def _worth(self, key: str, data: object) -> Worth:
        if not isinstance(data, dict):
            return Worth(self._number(key, data))
        self._mapping(key, data, ("points", "extra"))
        if "points" not in data:
            raise self._error(key, "lacks points")
        extra = data.get("extra", "false")
        if extra not in ("true", "false"):
            raise self._error(f"{key}.extra", f"is true or false, not {extra!r}")
        return Worth(self._number(f"{key}.points", data["points"]), extra == "true")

    def _late(self, data: object, deadline: datetime | None) -> Late:
        data = self._mapping("late", data, LATE_KEYS)
        if deadline is None:
            raise self._error("late", "needs a deadline, such as deadline: 2031-05-02T23:59+02:00")
        if "per_day" not in data:
            raise self._error("late", "lacks per_day, such as per_day: 10%")
        return Late(
            self._share("late.per_day", data["per_day"]),
            self._share("late.at_most", data.get("at_most", "100%")),
            self._duration("late.grace", data.get("grace", "0 minutes")),
        )

    def _overrides(self, data: object) -> Iterator[Override]:
        if not isinstance(data, list):
            raise self._error("overrides", f"is a list of mappings with {', '.join(OVERRIDE_KEYS)}")
        seen = set()
        for number, item in enumerate(data, 1):
            key = f"overrides.{number}"
            self._mapping(key, item, OVERRIDE_KEYS)
            if ("submission" in item) == ("student" in item):
                raise self._error(key, "names either a submission or a student")
            for needed in ("exercise", "points", "comment"):
                if not item.get(needed):
                    raise self._error(key, f"lacks {needed}")
            who = self._text(key, item.get("submission") or item.get("student"))
            exercise = self._exercise(f"{key}.exercise", item["exercise"])
            if (who, exercise) in seen:
                raise self._error(key, f"is the second one for {who}, exercise {exercise}")
            seen.add((who, exercise))
            points = self._number(f"{key}.points", item["points"])
            yield Override(who, exercise, points, self._text(f"{key}.comment", item["comment"]))

    def _times(self, submitted: str, deadline: datetime | None) -> Iterator[tuple[str, datetime]]:
        if submitted in ("", "metadata", "file times"):
            return
        path = self.path.parent / submitted
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise self._error(
                "submitted", f"is metadata, file times or a CSV file; {path} cannot be read: {error}"
            ) from error
        for number, row in enumerate(rows, 2):
            who, time = row.get("submission") or row.get("student"), row.get("time")
            if not who or not time:
                raise RubricError(f"{path}:{number}: needs the columns submission or student, and time")
            yield who, _moment(time, deadline, f"{path}:{number}")

    # --- values ---

    def _exercise(self, key: str, id: object) -> str:
        if id not in self.known:
            near = difflib.get_close_matches(str(id), self.known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise self._error(key, f"there is no exercise {id!r} in {self.scope}{hint}")
        return str(id)

    def _mapping(self, key: str, data: object, allowed: tuple[str, ...]) -> dict:
        if not isinstance(data, dict):
            raise self._error(key, f"is a mapping; its keys are {', '.join(allowed)}")
        for name in data:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1)
                hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"
                raise self._error(_join(key, name), f"is not known here; {hint}")
        return data

    def _text(self, key: str, data: object) -> str:
        if not isinstance(data, str):
            raise self._error(key, "is a text")
        return data

    def _number(self, key: str, data: object) -> float:
        try:
            number = float(data) if isinstance(data, str) else math.nan
        except ValueError:
            number = math.nan
        if not 0 <= number < 1e6:
            raise self._error(key, f"is a number of points, 0 or more, not {data!r}")
        return number

    def _share(self, key: str, data: object) -> float:
        text = data if isinstance(data, str) else ""
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise self._error(key, f"is a share such as 10% or 0.1, not {data!r}")
        return share

    def _duration(self, key: str, data: object) -> timedelta:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])[a-z]*", data.strip() if isinstance(data, str) else "")
        if not match:
            raise self._error(key, f"is a time such as 15 minutes, 2 hours or 1 day, not {data!r}")
        return timedelta(seconds=float(match[1]) * UNITS[match[2]])

    def _time(self, key: str, data: object) -> datetime:
        try:
            time = datetime.fromisoformat(data) if isinstance(data, str) else None
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise self._error(key, f"is a time with its zone, such as 2031-05-02T23:59+02:00, not {data!r}")
        return time

    def _error(self, key: str, message: str) -> RubricError:
        line = self.lines.get(key) or self.lines.get(key.rpartition(".")[0])
        where = f"{self.path}:{line}" if line else str(self.path)
        return RubricError(f"{where}: {key or 'the file'}: {message}")


def metadata_times(export: Path) -> dict[str, datetime]:
    """When each submission of a Gradescope export was made, by the name of its folder or file.

    The export is a folder, the folder around that, or a zip of either.
    """
    problems: list[Problem] = []
    found = [one for one in entries(export, problems)[0] if one.parts[-1] == METADATA and len(one.parts) <= 2]
    if not found:
        raise RubricError(f"submitted: metadata needs {METADATA} in {export}, which is not there")
    where = f"{export}: {found[0].shown}"
    try:
        text = b""
        for chunk in found[0].chunks():
            text += chunk
            if len(text) > 50 * MB:
                raise RubricError(f"{where} is too large")
        data = yaml.load(text, Loader=yaml.BaseLoader)  # makes nothing but text
        return {str(name): _moment(entry[":created_at"], None, where) for name, entry in data.items()}
    except (Unreadable, OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RubricError(f"{where}: no times found in it: {error}") from error


def _moment(text: str, deadline: datetime | None, where: str) -> datetime:
    """A time; one without a zone is in the deadline's, or else in UTC."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", text.strip())
    try:
        time = datetime.fromisoformat(re.sub(r"\s*(Z|UTC)$", "+00:00", text))
    except ValueError as error:
        raise RubricError(f"{where}: {text!r} is not a time such as 2031-05-02T23:59+02:00") from error
    if time.tzinfo is None:
        zone = deadline.tzinfo if deadline else None
        time = time.replace(tzinfo=zone) if zone else time.astimezone()
    return time


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _tidy(number: float) -> float:
    """0.3 for 0.30000000000000004."""
    return round(number, 6)

"""What may be read by whom: the words of every report, and what of a verdict a student receives.

A student receives the property that does not hold, the formula of their own code and the diagnosis. Whatever could
carry hidden inputs stays with the instructor: values, what the code printed, and the message of an exception, of which
a student sees the type and the own line.
"""

import builtins
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from .results import FactResult, Graded, Verdict
from .rubric import Scored, ScoredVerdict

ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])(?:[^\x00-\x1f\x9c]{0,500}(?:\x07|\x1b\\|\x9c))?"  # titles, links
    r"|\x1b[ -/]*[0-~]?"
)
JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
BREAKS = {"\r\n": "\n", "\r": "\n", "\u2028": "\n", "\u2029": "\n", "\x85": "\n"}

WORDS = {
    "right": "right",
    "wrong": "not right yet",
    "raised": "stopped with an error",
    "not done": "not done yet",
    "missing": "not found",
    "timeout": "out of time",
    "memory": "out of memory",
    "died": "process ended",
    "protocol": "no readable answer",
    "forbidden": "asked for the answer",
    "unreadable": "file not readable",
    "grader error": "not final",
}
MARKS = {"right": "✓", "not done": "·", "missing": "·", "unreadable": "?", "grader error": "!"}  # ✗ for the others
LOOKS = {  # what somebody should look at, the most urgent first
    "grader error": "our error in {}: counts nothing until somebody has looked",
    "died": "the process ended in {}",
    "protocol": "no readable answer in {}",
    "memory": "out of memory in {}",
    "timeout": "out of time in {}",
    "forbidden": "asked the package for the answer of {}",
}
URGENCY = ("grader error", "unreadable", *list(LOOKS)[1:], "identical", "note")
STATES = {
    "holds": ("✓", "holds"),
    "fails": ("✗", "does not hold"),
    "raises": ("✗", "stopped with an error"),
    "not reached": ("·", "not tried"),
    "not done": ("·", "not done"),
}
SENTENCES = {
    "right": "Every property holds.",
    "not done": "The body still says raise NotImplementedError, so there is no answer to look at yet.",
    "missing": "After all cells had run, nothing was called {names}. Is the name spelt as in the lesson, and does the "
    "cell that defines it run in a fresh notebook, from top to bottom?",
    "timeout": "It needed more time than there is. Is there an endless loop, or one over what could be a single tensor "
    "operation?",
    "memory": "It asked for more memory than there is. Is some tensor much larger than its inputs?",
    "died": "The Python process ended while your code ran, as os._exit() or a crash in native code would end it, and "
    "no answer was left to look at.",
    "protocol": "What came back could not be read as an answer: plain, dense tensors of ordinary numbers are expected.",
    "forbidden": "Your code asked the course's package for the answer itself, which is not available while grading: "
    "the answer is to be written in the notebook.",
    "unreadable": "The file could not be read as a notebook.",
    "grader error": "Something went wrong on our side, not in your code. The points of this exercise are not final: "
    "your instructor sees this message too.",
}
# exceptions that are not the student's own: the name of a class made on the spot could say anything
LIBRARIES = ("einops.EinopsError", "numpy.linalg.LinAlgError", "torch.OutOfMemoryError", "torch._C._LinAlgError")
TYPES = {
    *(name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)),
    *LIBRARIES,
}


def clean(text: str) -> str:
    """The text without what acts on a terminal or turns around what is read: escape sequences, control and bidi marks.

    Line breaks and tabs stay; lone surrogates become replacement characters, so that every file can be written.
    """
    if text.isprintable():
        return text
    text = ESCAPES.sub("", text)
    for old, new in BREAKS.items():
        text = text.replace(old, new)
    kept = (char for char in text if char in "\n\t" + JOINERS or unicodedata.category(char) not in ("Cc", "Cf"))
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) == "Cs" else char for char in kept)


def one_line(text: str, most: int = 0) -> str:
    """The cleaned text in one line, cut after `most` characters if that is not 0."""
    line = " ".join(clean(text).split())
    return line if not most or len(line) <= most else line[: most - 1] + "…"


def number(value: float) -> str:
    """At most two decimals, and no more than needed: 7, 6.4, 0.33."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if round(value, 2) else "0"


def percent(points: float, out_of: float) -> float | None:
    """Of 100; None where there is nothing to reach."""
    return 100 * points / out_of if out_of else None


def order(exercise: str) -> tuple[tuple[bool, int, str], ...]:
    """What to sort exercises by: 04.2 before 04.10."""
    return tuple((not part.isdigit(), int(part) if part.isdecimal() else 0, part) for part in exercise.split("."))


def named(scored: Scored) -> str:
    """Who handed it in, as far as that is known."""
    return scored.graded.student or scored.graded.submission


def mark(outcome: str) -> str:
    return MARKS.get(outcome, "✗")


def broken(verdict: Verdict) -> FactResult | None:
    """The first property that does not hold."""
    return next((fact for fact in verdict.facts if fact.state in ("fails", "raises")), None)


def reasons(scored: Scored, *, trivial: bool = False) -> list[tuple[str, str]]:
    """(kind, sentence) of all that somebody should look at, the most urgent first; `trivial` adds notes."""
    graded = scored.graded
    found: list[tuple[str, str]] = []
    if graded.status == "grader error":
        found.append(("grader error", "the grader failed on this submission: its points are not final"))
    for outcome, sentence in LOOKS.items():
        which = [
            one.verdict.exercise
            for one in scored.verdicts
            if one.verdict.outcome == outcome and (outcome != "grader error" or unsettled(one))
        ]
        if which:
            found.append((outcome, sentence.format(", ".join(which))))
    if graded.status == "unreadable":
        found.append(("unreadable", "; ".join(("not readable", *unreadable(graded)))))
    for state in ("died", "timeout", "memory"):
        which = [str(cell.number) for cell in graded.cells if cell.state == state]
        if which:
            found.append((state, LOOKS[state].format(f"{'cell' if len(which) == 1 else 'cells'} {', '.join(which)}")))
    if graded.identical_to:
        found.append(("identical", f"the same bytes as {', '.join(graded.identical_to)}"))
    if trivial:
        notes = () if graded.status == "unreadable" else graded.notes
        found += [("note", note) for note in notes]
        found += [("note", f"{one.verdict.exercise}: {note}") for one in scored.verdicts for note in one.verdict.notes]
    return found


def unreadable(graded: Graded) -> tuple[str, ...]:
    """Why a file could not be read, and what its student does about it: where no lesson is known, a note says it."""
    said = next((one.reason for one in graded.verdicts if one.outcome == "unreadable" and one.reason), "")
    return (said,) if said else graded.notes


def unsettled(scored: ScoredVerdict) -> bool:
    """Whether it counts nothing yet: our error, which no override has settled."""
    return scored.verdict.outcome == "grader error" and not scored.override


def worth(scored: ScoredVerdict) -> str:
    return "not counted yet" if unsettled(scored) else f"{number(scored.points)} of {number(scored.out_of)}"


@dataclass(frozen=True)
class Feedback:
    """What a student reads about one exercise."""

    exercise: str
    names: str
    outcome: str
    points: str
    sentence: str
    broken: str = ""
    formulas: tuple[str, ...] = ()
    diagnosis: str = ""
    facts: tuple[FactResult, ...] = ()
    comment: str = ""
    advice: str = ""

    @property
    def mark(self) -> str:
        return mark(self.outcome)

    @property
    def word(self) -> str:
        return WORDS[self.outcome]


def feedback(scored: ScoredVerdict, source: str = "") -> Feedback:
    """What a student receives. `source`: the code of the notebook; a line of it is quoted only if it stands there, for
    which line raised is what the student's process says.
    """
    verdict = scored.verdict
    names = ", ".join(verdict.names)
    first = broken(verdict)
    wrong = verdict.outcome in ("wrong", "raised")
    help = verdict.outcome not in ("right", "unreadable", "grader error")
    return Feedback(
        exercise=verdict.exercise,
        names=names,
        outcome=verdict.outcome,
        points=worth(scored),
        sentence=_sentence(verdict, source),
        broken=first.name if first else "",
        formulas=verdict.formulas if wrong else (),
        diagnosis=(verdict.diagnosis or "") if wrong else "",
        facts=tuple(FactResult(fact.name, fact.state) for fact in verdict.facts),
        comment=scored.override,
        advice=f'check("{verdict.exercise}", {names}, hint=2)' if help else "",
    )


def _sentence(verdict: Verdict, source: str) -> str:
    if verdict.outcome == "wrong":
        holding = sum(fact.state == "holds" for fact in verdict.facts)
        return f"{holding} of {len(verdict.facts)} properties hold." if verdict.facts else "A property does not hold."
    if verdict.outcome == "raised":
        messages = [fact.message for fact in verdict.facts if fact.state == "raises"]
        return stopped(messages[0] if messages else verdict.reason, verdict.names, source)
    return SENTENCES[verdict.outcome].format(names=", ".join(verdict.names))


def stopped(message: str, names: Iterable[str], source: str) -> str:
    """Of an exception on hidden inputs its type and the own line: a message could carry the inputs out."""
    lines = [line for line in message.splitlines() if line.strip()] or [""]
    kind = lines[0].partition(":")[0].strip()
    text = f"Your code stopped with {kind}" if kind in TYPES else "Your code stopped with an exception"
    place = re.fullmatch(r"\s*at line (\d{1,5}) of ([^\s:]+):\s*(.*)", lines[-1])
    if not place:
        return f"{text}."
    line, function, code = place.groups()
    known = function in names or (function.isidentifier() and function in source)
    quoted = {own.strip() for own in source.splitlines()}
    text += f" at line {line}" + (f" of {function}" if known else "")
    return f"{text}: {code.strip()}" if code.strip() and code.strip() in quoted else f"{text}."


def as_text(item: Feedback) -> str:
    """The feedback as plain text, for exports that have no pages of their own."""
    lines = [item.sentence]
    if item.broken:
        lines.append(f"Does not hold: {item.broken}")
    lines += [f"Your code computes: {formula}" for formula in item.formulas]
    if item.diagnosis:
        lines.append(f"Probably: {item.diagnosis}")
    if item.comment:
        lines.append(f"Your instructor: {item.comment}")
    if item.advice:
        lines.append(f"In the notebook, {item.advice} tries your answer on fresh inputs and says where to look.")
    return clean("\n".join(lines))


def late_sentence(scored: Scored) -> str:
    """What came off for lateness, or what is to be said about the time; empty if nothing is."""
    off = f"{number(scored.late)} {'point' if scored.late == 1 else 'points'} came off" if scored.late else ""
    return clean(": ".join(part for part in (off, scored.late_note) if part))

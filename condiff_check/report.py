"""What a learner reads: one line per fact, what they implemented, which mistake it is, one hint."""

from dataclasses import dataclass
from html import escape

from .exercise import Exercise, Fact

RIGHT, WRONG, NOT_DONE = "right", "wrong", "not done"
MARKS = {"holds": "✓", "fails": "✗", "raises": "✗", "not reached": "·", "not done": "·"}
COLOURS = {RIGHT: "#1a7f37", WRONG: "#c0392b", NOT_DONE: "#8a6d1a"}


@dataclass(frozen=True)
class Result:
    """How one fact came out. `expected` is for the last hint."""

    fact: Fact
    state: str
    message: str = ""
    expected: str | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of one check: str() for a terminal, HTML in a notebook."""

    exercise: Exercise
    status: str
    results: tuple[Result, ...]
    hint: int
    seed: int
    formulas: tuple[str, ...] = ()
    diagnosis: str | None = None
    relation: str | None = None
    printed: str = ""

    @property
    def names(self) -> str:
        return ", ".join(self.exercise.names)

    @property
    def headline(self) -> str:
        if self.status == NOT_DONE:
            return f"{self.exercise.id} {self.names}: not done yet"
        word = "right" if self.status == RIGHT else "not right yet"
        return f"{self.exercise.id} {self.names}: {word}"

    @property
    def first(self) -> Result | None:
        """The first fact that does not hold."""
        return next((r for r in self.results if r.state in ("fails", "raises")), None)

    def notes(self) -> list[tuple[str, str]]:
        """(title, text) of everything below the facts."""
        notes = []
        if self.status == WRONG:
            notes += [("You implemented", formula) for formula in self.formulas]
            if self.diagnosis:
                notes.append(("Probably", self.diagnosis))
            elif self.relation:
                notes.append(("Compared with the right one", self.relation))
        elif self.diagnosis:
            notes.append(("Note", self.diagnosis))
        if self.printed:
            notes.append(("Your code printed", self.printed))
        notes += self._hints()
        if self.status != RIGHT:
            notes.append(("Meanwhile", "the cells below use the reference answer."))
        return notes

    def _hints(self) -> list[tuple[str, str]]:
        where, answer = self.exercise.hints
        hints = []
        if self.status == WRONG and self.first and self.first.fact.hint:
            hints.append(("Hint 1", self.first.fact.hint))
        if self.status == RIGHT:
            return []
        if self.hint >= 2:
            hints.append(("Hint 2", where))
        if self.hint >= 3:
            hints.append(("Hint 3, the answer", answer))
            hints += [("Expected", formula.expected) for formula in self.exercise.formulas]
            if self.first and self.first.expected:
                hints.append(("Expected here", self.first.expected))
        if self.hint < 3:
            names = ", ".join(self.exercise.names)
            hints.append(("More help", f'check("{self.exercise.id}", {names}, hint={max(self.hint + 1, 2)})'))
        return hints

    def __str__(self) -> str:
        lines = [self.headline]
        if self.status != NOT_DONE or any(r.state == "holds" for r in self.results):
            for result in self.results:
                lines.append(f"  {MARKS[result.state]} {result.fact.name}")
                if result.message:
                    lines += [f"      {line}" for line in result.message.splitlines()]
        for title, text in self.notes():
            first, *rest = text.splitlines() or [""]
            lines += [f"  {title}: {first}", *(f"      {line}" for line in rest)]
        if self.status == WRONG:
            lines.append(f"  (the same inputs again: seed={self.seed})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        colour = COLOURS[self.status]
        rows = []
        if self.status != NOT_DONE or any(r.state == "holds" for r in self.results):
            rows = [self._row(result) for result in self.results]
        notes = "".join(
            f'<div style="margin-top:.3em"><b>{escape(title)}:</b> '
            f'<span style="white-space:pre-wrap">{_text(title, text)}</span></div>'
            for title, text in self.notes()
        )
        seed = f'<div style="opacity:.6">the same inputs again: seed={self.seed}</div>' if self.status == WRONG else ""
        return (
            f'<div style="border-left:4px solid {colour};padding:.3em .8em;margin:.3em 0">'
            f'<b style="color:{colour}">{escape(self.headline)}</b>{"".join(rows)}{notes}{seed}</div>'
        )

    def _row(self, result: Result) -> str:
        good = result.state == "holds"
        colour = COLOURS[RIGHT] if good else COLOURS[WRONG] if result.state in ("fails", "raises") else "inherit"
        detail = f'<pre style="margin:.1em 0 .2em 1.6em">{escape(result.message)}</pre>' if result.message else ""
        mark = f'<span style="color:{colour}">{MARKS[result.state]}</span>'
        return f"<div>{mark} {escape(result.fact.name)}{detail}</div>"


def _text(title: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if title in ("You implemented", "More help", "Expected") else escape(text)

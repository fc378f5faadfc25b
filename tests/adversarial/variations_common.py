"""What a legitimate variation is: a notebook that does things its own way, and must be graded right."""

from collections.abc import Sequence
from dataclasses import dataclass

from notebooks import notebook


@dataclass(frozen=True)
class Variation:
    """entry: number in part B of GRADING.md; "+" for our own. ids: the exercises that must be graded right. needs: a
    package that it imports and the course does not."""

    entry: str
    name: str
    lesson: str
    ids: tuple[str, ...]
    content: bytes
    needs: str | None = None
    fast: bool = False
    file: str = "submission.ipynb"

    @property
    def id(self) -> str:
        return f"{self.entry}-{self.name.replace(' ', '-')}"


def answered(entry: str, name: str, answers: dict[str, str | None], **more) -> Variation:
    """These answers in an otherwise usual notebook."""
    kept = {key: more.pop(key) for key in ("needs", "fast", "file") if key in more}
    ids = tuple(answers)
    return Variation(entry, name, ids[0].partition(".")[0], ids, notebook(answers, **more), **kept)


def built(entry: str, name: str, ids: Sequence[str], content: bytes, **more) -> Variation:
    return Variation(entry, name, ids[0].partition(".")[0], tuple(ids), content, **more)

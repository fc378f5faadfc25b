"""The class as tables: one for the terminal, and CSV files that a spreadsheet opens without running anything."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from .feedback import WORDS, broken, mark, named, number, one_line, order, percent, reasons
from .rubric import Scored, ScoredVerdict

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # what a spreadsheet takes for the start of a formula
LEGEND = "✓ right   ✗ not right   · not done or not found   ? not readable   ! our error, not final"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace the file at once: whoever reads sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sort(scored: Iterable[Scored]) -> list[Scored]:
    """In the order of all reports: by lesson, then by student."""
    return sorted(scored, key=lambda one: (one.graded.lesson, named(one), one.graded.submission))


def exercises(scored: Iterable[Scored]) -> list[str]:
    """The exercises that occur, in order."""
    return sorted({one.verdict.exercise for each in scored for one in each.verdicts}, key=order)


def table(scored: Sequence[Scored]) -> Table:
    """For a terminal: a line per submission, a mark per exercise."""
    result = Table(caption=LEGEND, caption_justify="left")
    for title, justify in (("student", "left"), ("lesson", "left"), ("points", "right"), ("%", "right")):
        result.add_column(title, justify=justify, overflow="fold")
    for title in ("exercises", "to look at"):
        result.add_column(title, overflow="fold")
    for one in sort(scored):
        share = percent(one.points, one.out_of)
        cells = (
            one_line(named(one), 40),
            one_line(one.graded.lesson, 10),
            f"{number(one.points)} of {number(one.out_of)}",
            "" if share is None else f"{share:.0f}",
            "".join(mark(item.verdict.outcome) for item in one.verdicts),
            one_line("; ".join("not readable" if kind == "unreadable" else text for kind, text in reasons(one)), 200),
        )
        result.add_row(*(Text(cell) for cell in cells))  # Text, not str: what looks like markup is shown as it is
    return result


def write_tables(scored: Sequence[Scored], folder: Path) -> list[Path]:
    """scores.csv, verdicts.csv and mistakes.csv; returns their paths."""
    scored = sort(scored)
    files = {"scores.csv": _scores(scored), "verdicts.csv": _verdicts(scored), "mistakes.csv": _mistakes(scored)}
    for name, rows in files.items():
        write_atomically(Path(folder) / name, to_csv(rows))
    return [Path(folder) / name for name in files]


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """As CSV, each value in one line, numbers as they are, and no text that begins like a formula."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".") if round(value, 4) else "0"
    text = one_line(str(value))
    return f"'{text}" if text.startswith(FORMULA) else text


def _scores(scored: Sequence[Scored]) -> list[list[object]]:
    ids = exercises(scored)
    head = ["id", "student", "lesson", "file", "status", "points", "out_of", "percent", "late", "level"]
    rows: list[list[object]] = [[*head, *(title for id in ids for title in (f"{id} points", f"{id} outcome"))]]
    for one in scored:
        graded = one.graded
        found = {item.verdict.exercise: item for item in one.verdicts}
        row: list[object] = [graded.submission, graded.student, graded.lesson, graded.file, graded.status]
        row += [one.points, one.out_of, percent(one.points, one.out_of), one.late, graded.level]
        for id in ids:
            row += [found[id].points, found[id].verdict.outcome] if id in found else [None, None]
        rows.append(row)
    return rows


def _verdicts(scored: Sequence[Scored]) -> list[list[object]]:
    head = "id student lesson exercise names outcome points out_of override mistake diagnosis property message reason"
    rows: list[list[object]] = [[*head.split(), "formulas", "relation", "notes", "calls", "seconds"]]
    return rows + [_verdict(one, item) for one in scored for item in one.verdicts]


def _verdict(one: Scored, item: ScoredVerdict) -> list[object]:
    graded, verdict, first = one.graded, item.verdict, broken(item.verdict)
    return [
        *(graded.submission, graded.student, graded.lesson, verdict.exercise, " ".join(verdict.names)),
        *(verdict.outcome, item.points, item.out_of, item.override, verdict.mistake, verdict.diagnosis),
        *(first.name if first else None, first.message if first else None, verdict.reason),
        *("; ".join(verdict.formulas), verdict.relation, "; ".join(verdict.notes), verdict.calls, verdict.seconds),
    ]


def _mistakes(scored: Sequence[Scored]) -> list[list[object]]:
    rows: list[list[object]] = [["exercise", "names", "submissions", "right", "kind", "mistake", "count"]]
    for id in exercises(scored):
        found = [item for one in scored for item in one.verdicts if item.verdict.exercise == id]
        right = sum(item.verdict.outcome == "right" for item in found)
        start = [id, " ".join(found[0].verdict.names), len(found), right]
        counts = mistakes(found)
        rows += [[*start, kind, text, count] for (kind, text), count in counts] or [[*start, None, None, 0]]
    return rows


def mistakes(found: Iterable[ScoredVerdict]) -> list[tuple[tuple[str, str], int]]:
    """((kind, text), count), the most frequent first. kind: "mistake" for one on file, "property" for the first that
    does not hold where no mistake was recognised, else "outcome".
    """
    counts = Counter(_mistake(item) for item in found if item.verdict.outcome != "right")
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _mistake(item: ScoredVerdict) -> tuple[str, str]:
    verdict, first = item.verdict, broken(item.verdict)
    if verdict.mistake:
        return "mistake", verdict.mistake
    if verdict.outcome == "wrong" and first:
        return "property", first.name
    return "outcome", WORDS[verdict.outcome]

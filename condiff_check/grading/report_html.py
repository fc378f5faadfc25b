"""Pages: one per submission for the student, one for the instructor, and the class at a glance.

A page is one file without any other: style and script stand in it, and its content security policy lets nothing else
in, neither from the net nor from a student's text. The same input gives the same bytes.
"""

import base64
import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .feedback import (
    STATES,
    URGENCY,
    WORDS,
    clean,
    feedback,
    late_sentence,
    mark,
    named,
    number,
    one_line,
    percent,
    reasons,
    unreadable,
    worth,
)
from .results import Graded
from .rubric import Scored
from .tables import LEGEND, exercises, mistakes, sort, write_atomically

TEMPLATES = Path(__file__).parent / "templates"
KINDS = {"right": "good", "not done": "wait", "missing": "wait", "unreadable": "wait", "grader error": "ours"}
KEYS = {word: place for place, word in enumerate(WORDS)}  # what a column of marks is sorted by
MOST = 6  # mistakes shown per exercise
MANIFEST = "pages.txt"
OURS = re.compile(r"(students|instructor)/[A-Za-z0-9_][A-Za-z0-9._-]{0,110}\.html")
SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(?<!\.)")
DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # Windows opens these instead of a file
PROMISES = {
    "P0": "The student’s code had a process of its own and no say in the points; it could read files and use the "
    "network as the account that graded. Take care with submissions that you do not trust.",
    "L1": "The student’s code could read an allowed list of files only, write to its own folder only, and had no "
    "network.",
    "L2": "For the student’s code other submissions, the network and the grader’s files did not exist.",
}


def write_pages(
    scored: Sequence[Scored], folder: Path, problems: Sequence[str] = (), sources: Mapping[str, str] | None = None
) -> Path:
    """Write students/ID.html, instructor/ID.html and index.html; returns the path of the last.

    problems: sentences about the batch itself, such as files that are no submissions. sources: the code of each
    notebook by the id of its submission; where it is given, a student who is told which line raised reads that line.
    Pages that an earlier call wrote, and this one does not, are removed: pages.txt lists them. Raises ValueError where
    two submissions have one id.
    """
    folder, scored = Path(folder), sort(scored)
    pages = page_names([one.graded.submission for one in scored])
    due = {f"{kind}/{page}" for kind in ("students", "instructor") for page in pages.values()}
    before = _manifest(folder)
    write_atomically(folder / MANIFEST, "".join(f"{name}\n" for name in sorted(due | before)))
    for one in scored:
        id = one.graded.submission
        shown = _student(one, (sources or {}).get(id, ""))
        write_atomically(folder / "students" / pages[id], _render("student.html.j2", shown))
        write_atomically(folder / "instructor" / pages[id], _render("instructor.html.j2", _instructor(one, pages[id])))
    index = folder / "index.html"
    write_atomically(index, _render("index.html.j2", _index(scored, pages, problems), script="sort.js"))
    for name in before - due:  # whoever has withdrawn, or has another name now
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / MANIFEST, "".join(f"{name}\n" for name in sorted(due)))
    return index


def _manifest(folder: Path) -> set[str]:
    """The pages that were written here before; what else lies in the folder is not ours to remove."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return {line for line in lines if OURS.fullmatch(line)}


def page_names(ids: Sequence[str]) -> dict[str, str]:
    """A file name for each id: the id itself where every system takes it, else what is left of it and a hash."""
    if len(set(ids)) != len(ids):
        raise ValueError(f"two submissions have the id {Counter(ids).most_common(1)[0][0]!r}")
    alike = Counter(id.lower() for id in ids)
    return {id: f"{id if _safe(id) and alike[id.lower()] == 1 else _shortened(id)}.html" for id in ids}


def _safe(id: str) -> bool:
    return bool(SAFE.fullmatch(id)) and not DEVICES.fullmatch(id)


def _shortened(id: str) -> str:
    kept = re.sub(r"[^A-Za-z0-9]+", "-", id)[:60].strip("-") or "submission"
    return f"{kept}-{hashlib.sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


# ---------------------------------------------------------------- one submission


def _student(one: Scored, source: str) -> dict[str, Any]:
    graded = one.graded
    alerts = []
    if graded.status == "unreadable":
        alerts = [
            "This file could not be read as a notebook, so nothing in it was graded.",
            *map(_sentence, unreadable(graded)),
        ]
    elif graded.status == "grader error":
        alerts = [
            "Something went wrong on our side while this was graded, not in your code. These points are not final: "
            "your instructor sees this message too."
        ]
    return {**_both(one), "alerts": alerts, "items": [feedback(item, source) for item in one.verdicts]}


def _instructor(one: Scored, page: str) -> dict[str, Any]:
    cells = one.graded.cells
    states = Counter(cell.state for cell in cells)
    counted = ", ".join(
        f"{states[state]} {state}" for state in sorted(states, key=lambda state: (-states[state], state))
    )
    return {
        **_both(one),
        "page": page,
        "looks": reasons(one, trivial=True),
        "verdicts": one.verdicts,
        "odd_cells": [cell for cell in cells if cell.state != "ran"],
        "cells_summary": f"{len(cells)} code {'cell' if len(cells) == 1 else 'cells'}: {counted}."
        if cells
        else "None ran.",
        "isolation": _isolation(one.graded),
    }


def _both(one: Scored) -> dict[str, Any]:
    return {
        "graded": one.graded,
        "student": one_line(named(one)),
        "lesson": _lesson(one.graded.lesson),
        "headline": f"{number(one.points)} of {number(one.out_of)} points" if one.verdicts else "nothing graded",
        "late": late_sentence(one),
        "summary": _summary(one),
    }


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}" + ("" if note.endswith((".", "!", "?")) else ".")


def _lesson(lesson: str) -> str:
    return f"Lesson {one_line(lesson)}" if lesson else "No lesson"


def _summary(one: Scored) -> str:
    if not one.verdicts:
        return "No exercise was graded."
    right = sum(item.verdict.outcome == "right" for item in one.verdicts)
    total = len(one.verdicts)
    if right == total:
        return "All of it is right. Well done!" if total > 1 else "It is right. Well done!"
    if not right:
        return "It is not right yet." if total == 1 else f"None of the {total} exercises is right yet."
    return f"{right} of {total} exercises {'is' if right == 1 else 'are'} right."


def _isolation(graded: Graded) -> str:
    if not graded.level:
        return "no code of it was run"
    return f"{graded.level}: {', '.join(graded.layers) or 'no layer beyond a process of its own'}"


# ---------------------------------------------------------------- the class


def _index(scored: Sequence[Scored], pages: Mapping[str, str], problems: Sequence[str]) -> dict[str, Any]:
    lessons = sorted({one.graded.lesson for one in scored})
    ids = exercises(scored)
    rows = [_row(one, pages[one.graded.submission], ids) for one in scored]
    urgent = sorted(zip(rows, map(reasons, scored), strict=True), key=lambda pair: _urgency(pair[1]))
    looks = [(row, [text for _, text in found]) for row, found in urgent]
    noted = [
        (row, [text for kind, text in reasons(one, trivial=True) if kind == "note"])
        for row, one in zip(rows, scored, strict=True)
    ]
    looks, noted = ([pair for pair in pairs if pair[1]] for pairs in (looks, noted))
    count = f"{len(scored)} {'submission' if len(scored) == 1 else 'submissions'}"
    return {
        "title": f"{_lessons(lessons)}{count}",
        "isolation": isolation_sentences([one.graded for one in scored]),
        "tiles": _tiles(scored, len(looks)),
        "problems": problems,
        "looks": looks,
        "noted": noted,
        "several": len(lessons) > 1,
        "any_late": any(one.late for one in scored),
        "histogram": histogram([percent(one.points, one.out_of) for one in scored]),
        "exercises": [_exercise(id, scored) for id in ids],
        "ids": ids,
        "rows": rows,
        "legend": LEGEND.replace("   ", ", "),
        "keys": {**KEYS, "": ""},
    }


def _urgency(found: Sequence[tuple[str, str]]) -> int:
    return min((URGENCY.index(kind) for kind, _ in found), default=len(URGENCY))


def _lessons(lessons: Sequence[str]) -> str:
    known = [one_line(lesson) for lesson in lessons if lesson]
    if not known:
        return ""
    return f"Lesson {known[0]}: " if len(known) == 1 else f"Lessons {', '.join(known)}: "


def isolation_sentences(graded: Sequence[Graded]) -> list[str]:
    """Which layers were on, for whom, and what that promises."""
    ways = Counter((one.level, one.layers) for one in graded if one.level)
    sentences = []
    for (level, layers), count in sorted(ways.items(), key=lambda pair: (-pair[1], pair[0])):
        who = "All code was run" if len(ways) == 1 else f"The code of {count} of {len(graded)} submissions was run"
        with_ = f" ({', '.join(layers)})" if layers else ""
        sentences.append(f"{who} at isolation level {level}{with_}. {PROMISES.get(level, '')}".strip())
    none = sum(not one.level for one in graded)
    if none:
        what = "submission was" if none == 1 else "submissions were"
        sentences.append(f"{none} {what} not run at all.")
    return sentences


def _tiles(scored: Sequence[Scored], looks: int) -> list[tuple[str, str]]:
    shares = [share for one in scored if (share := percent(one.points, one.out_of)) is not None]
    right = sum(bool(one.verdicts) and all(item.verdict.outcome == "right" for item in one.verdicts) for one in scored)
    median = [(f"{statistics.median(shares):.0f} %", "of the points, the median")] if shares else []
    return [(str(len(scored)), "submissions"), *median, (str(right), "with all right"), (str(looks), "to look at")]


def _row(one: Scored, page: str, ids: Sequence[str]) -> dict[str, Any]:
    found = {item.verdict.exercise: item.verdict.outcome for item in one.verdicts}
    share = percent(one.points, one.out_of)
    return {
        "page": page,
        "student": one_line(named(one)),
        "lesson": one_line(one.graded.lesson),
        "value": round(one.points, 6),
        "points": number(one.points),
        "out_of": number(one.out_of),
        "share": "" if share is None else round(share, 4),
        "percent": "" if share is None else f"{share:.0f}",
        "late": round(one.late, 6),
        "late_text": f"−{number(one.late)}" if one.late else "",
        "outcomes": [found.get(id, "") for id in ids],
        "status": one.graded.status,
    }


def histogram(shares: Sequence[float | None]) -> dict[str, Any]:
    """Ten bars from 0 to 100 %; the last holds 100 and what is above."""
    known = sorted(share for share in shares if share is not None)
    counts = Counter(min(9, max(0, int(share // 10))) for share in known)
    most = max(counts.values(), default=1)
    bars = []
    for place in range(10):
        height = round(130 * counts[place] / most, 1)
        bar = {"x": 15 + 62 * place, "y": round(160 - height, 1), "height": height, "count": counts[place]}
        bars.append({**bar, "label": f"{10 * place} to {10 * place + 10}"})
    text = ", ".join(f"{bar['label']} percent: {bar['count']}" for bar in bars if bar["count"])
    sentence = ""
    if known:
        mean, low, high = statistics.fmean(known), known[0], known[-1]
        sentence = (
            f"From {low:.0f} to {high:.0f} % of the points; mean {mean:.0f} %, median {statistics.median(known):.0f} %."
        )
    return {"bars": bars, "total": len(known), "text": f"Histogram of the points. {text}", "sentence": sentence}


def _exercise(id: str, scored: Sequence[Scored]) -> dict[str, Any]:
    found = [item for one in scored for item in one.verdicts if item.verdict.exercise == id]
    right = sum(item.verdict.outcome == "right" for item in found)
    worth = sorted({item.out_of for item in found})
    counts = mistakes(found)
    diagnoses = {item.verdict.mistake: item.verdict.diagnosis for item in found if item.verdict.diagnosis}
    return {
        "id": id,
        "names": ", ".join(found[0].verdict.names),
        "points": f"{' or '.join(map(number, worth))} {'point' if worth == [1] else 'points'}",
        "right": right,
        "total": len(found),
        "share": round(100 * right / len(found), 2),
        "mistakes": [
            {
                "kind": kind,
                "text": text,
                "said": diagnoses.get(text, "") if kind == "mistake" and count > 1 else "",
                "count": count,
                "share": round(100 * count / len(found), 2),
            }
            for (kind, text), count in counts[:MOST]
        ],
        "more": len(counts[MOST:]),
    }


# ---------------------------------------------------------------- rendering


def _render(template: str, values: Mapping[str, Any], script: str = "") -> str:
    style, code = _text("style.css"), _text(script) if script else ""
    policy = f"default-src 'none'; style-src '{_hash(style)}'; base-uri 'none'; form-action 'none'"
    policy += f"; script-src '{_hash(code)}'" if code else ""
    made = _environment().get_template(template)
    return made.render(values, policy=policy, style=Markup(style), script=Markup(code)) + "\n"


@cache
def _text(name: str) -> str:
    return (TEMPLATES / name).read_text()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(points=number, worth=worth)
    outcomes = {outcome: KINDS.get(outcome, "bad") for outcome in WORDS}
    environment.globals.update(kinds={**outcomes, "": ""}, words=WORDS, states=STATES, marks=mark)
    return environment


def _finalize(value: object) -> object:
    """All text of a page passes here: nothing that acts on a reader's terminal or turns text around comes through."""
    return clean(value) if type(value) is str else value

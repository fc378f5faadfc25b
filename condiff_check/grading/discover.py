"""Find the submissions in what an instructor downloaded: whose each notebook is, and for which lesson."""

import hashlib
import hmac
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .. import registry
from .intake import MB, Notebook, Unreadable, read_limited
from .listing import Entry, Folders, Problem, entries, plain
from .roster import Roster, gradescope

STRAYS = (".py", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".html", ".htm", ".zip", ".gz", ".tgz", ".tar", ".7z", ".rar")
STRAYS += (".ipynb.txt", ".ipynb.json")


@dataclass(frozen=True)
class Submission:
    """One student's notebook for one lesson. `lesson` is None where neither name, content nor caller tells.

    id: unique in its batch and fit for a file name. path: the notebook, or the zip that holds it as `member`.
    """

    id: str
    student: str
    lesson: str | None
    path: Path
    member: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """names: each student's id here, and as the files or the roster have it. missing: of the roster, without a file."""

    submissions: tuple[Submission, ...]
    problems: tuple[Problem, ...]
    names: dict[str, str]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Taken:
    """A submission's content, read once. sha256 is of all its bytes, "" where they could not be read to the end."""

    sha256: str
    notebook: Notebook | None
    problem: Unreadable | None = None


@dataclass(frozen=True)
class _Item:
    """A file, whose it is as the download has it, and the lesson that its name begins with."""

    entry: Entry
    owner: str
    lesson: str | None
    notes: tuple[str, ...] = ()


def discover(
    path: str | os.PathLike,
    lesson: str | None = None,
    roster: str | os.PathLike | None = None,
    anonymise: bytes | None = None,
) -> Found:
    """The submissions in a folder, a zip or a file. Only names are read, and notebooks whose lesson they leave open.

    lesson: what notebooks are for whose names do not begin with a number; of the others only its own count.
    roster: a CSV with the columns id and, if wanted, name and file. anonymise: a secret that turns ids into s-1a2b3c4d.
    Raises ValueError for a roster that cannot be used.
    """
    listed = Roster.read(roster) if roster else None
    problems: list[Problem] = []
    files, folders = entries(Path(path), problems)
    root, groups = _root(files, Path(path), problems)
    items = [_item(entry, entry.parts[len(root) :], groups) for entry in files if entry.parts[: len(root)] == root]
    if listed:
        items = _known(items, root, listed, problems)
    kept = _one_each([item for item in items if item.entry.notebook], lesson, problems)
    _left_over(items, _empty(items, folders, root), problems)
    return _found(kept, problems, listed, anonymise)


def take(submission: Submission) -> Taken:
    """Read a submission: hash and notebook come from the same bytes. Nothing that a file holds makes it raise."""
    entry, digest, whole = Entry((), submission.path, submission.member), hashlib.sha256(), False

    def drawn() -> Iterator[bytes]:
        nonlocal whole
        for chunk in entry.chunks():
            digest.update(chunk)
            yield chunk
        whole = True

    try:
        notebook = read_limited(drawn())
    except Unreadable as problem:
        return Taken(digest.hexdigest() if whole else "", None, problem)
    return Taken(digest.hexdigest(), notebook)


# Whose is it?

WRAPPER = re.compile(r"submissions?|assignment_\d+_export", re.IGNORECASE)
MOODLE = re.compile(r"(?P<name>.+)_(?P<number>\d+)_assignsubmission_(file|onlinetext)_?(?P<rest>.*)", re.DOTALL)
CANVAS = re.compile(
    r"(?P<name>[^\d_].*?)(?P<late>_late)?_(?P<user>\d{3,})_\d{3,}_(?P<rest>.+)", re.IGNORECASE | re.DOTALL
)

Groups = dict[str, tuple[str, ...]] | None


def _root(files: list[Entry], path: Path, problems: list[Problem]) -> tuple[tuple[str, ...], Groups]:
    """The folder in which the students' files or folders lie, and Gradescope's submitters by folder."""
    for entry in files:
        if entry.parts[-1] == "submission_metadata.yml" and len(entry.parts) <= 2:
            return entry.parts[:-1], _submitters(entry, problems)
    for entry in files:
        if "submitted" in entry.parts[:-1][:2]:
            return entry.parts[: entry.parts.index("submitted") + 1], None
    first = {entry.parts[0] for entry in files if len(entry.parts) > 1}
    if len(first) == 1 and all(len(entry.parts) > 1 for entry in files):
        (name,) = first
        if WRAPPER.fullmatch(name) or (path.suffix.lower() == ".zip" and name == path.stem):
            return (name,), None
    return (), None


def _submitters(entry: Entry, problems: list[Problem]) -> Groups:
    try:
        data = b""
        for chunk in entry.chunks():
            data += chunk
            if len(data) > 50 * MB:
                raise ValueError("submission_metadata.yml is too large")
        return gradescope(data)
    except (Unreadable, ValueError) as error:
        problems.append(Problem(f"students are named by their submissions' numbers, since {error}"))
        return {}


def _item(entry: Entry, parts: tuple[str, ...], groups: Groups = None) -> _Item:
    name, notes = parts[-1], []
    owner = parts[0] if len(parts) > 1 else ""
    if groups and groups.get(owner):
        together = groups[owner]
        owner = together[0]
        if len(together) > 1:
            notes.append(f"handed in by {len(together)} students together; the first one's id stands for all")
    for part in parts if groups is None else ():
        moodle = MOODLE.fullmatch(part)
        if moodle:
            owner = f"{moodle['name']}_{moodle['number']}"
            name = moodle["rest"] if part is name else name
    canvas = CANVAS.fullmatch(name) if not owner else None
    if canvas:
        owner, name = f"{canvas['name']}_{canvas['user']}", canvas["rest"]
        notes += ["Canvas marks it as late"] if canvas["late"] else []
    number = next(filter(None, (_number(part) for part in (name, *parts[-2:0:-1]))), None)
    return _Item(entry, owner or _stem(name, number), number, tuple(notes))


def _number(name: str) -> str | None:
    """The lesson's number that a name begins with."""
    found = re.match(r"(\d\d)(?![0-9A-Za-z])", name)
    return found[1] if found and found[1] in registry.lessons() else None


def _stem(name: str, number: str | None) -> str:
    """A student's id from a file's name: without its ending, the lesson's number, and a browser's (2)."""
    stem = re.sub(r"(\.ipynb)?(\.\w{1,5})?$", "", name, count=1, flags=re.IGNORECASE)
    stem = re.sub(r"\s*\(\d+\)$", "", stem)
    short = stem[2:].lstrip("_-. ") if number and stem.startswith(number) else stem
    return short or stem or name


def ident(owner: str) -> str:
    """An id of [A-Za-z0-9._-] that any system takes as a file's name; where that loses letters, a hash tells apart."""
    text = "".join(c for c in unicodedata.normalize("NFKD", owner) if not unicodedata.combining(c))
    text = re.sub(r"\s+", "-", text.strip())
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("-.").rstrip("-.")
    reserved = re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", safe.partition(".")[0], re.IGNORECASE)
    if safe != text or not safe or reserved or len(safe) > 90:
        mark = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        safe = f"{'x-' if reserved else ''}{safe[:70] or 'student'}-{mark}"
    return safe


def _known(items: list[_Item], root: tuple[str, ...], roster: Roster, problems: list[Problem]) -> list[_Item]:
    """The files with their owners' ids from the roster."""
    known = []
    for item in items:
        ids = sorted(roster.find(item.owner, item.entry.parts[len(root) :]))
        if len(ids) > 1:
            problems.append(
                Problem(f"it may be of {' or '.join(ids[:5])} in the roster", (item.entry.shown,), ident(item.owner))
            )
        elif ids:
            known.append(replace(item, owner=ids[0]))
        else:
            known.append(replace(item, notes=(*item.notes, "its student is not in the roster")))
    return known


# Which lesson is it for?


def _one_each(items: list[_Item], lesson: str | None, problems: list[Problem]) -> list[_Item]:
    """One notebook per student and lesson; where there are several, or two students are hard to tell apart, none."""
    students = defaultdict(list)
    for item in items:
        students[ident(item.owner).casefold()].append(item)
    kept = []
    for theirs in students.values():
        if len({item.owner for item in theirs}) > 1:
            message = f"two students cannot be told apart, both would have the id {ident(theirs[0].owner)}"
            problems.append(Problem(message, _shown(theirs), ident(theirs[0].owner)))
        else:
            kept += _by_lesson(theirs, lesson, problems)
    return kept


def _by_lesson(theirs: list[_Item], lesson: str | None, problems: list[Problem]) -> list[_Item]:
    student, kept = ident(theirs[0].owner), []
    groups = _grouped(theirs, lesson)
    if not any(groups.values()):
        problems.append(Problem(f"{student} has nothing for lesson {lesson}", _shown(theirs), student))
    used = {id(item) for group in groups.values() for item in group}
    left = sum(item.lesson is None and id(item) not in used for item in theirs)
    note = (f"beside it {left} more of no lesson or another one, left out",) if left else ()
    for number, group in groups.items():
        if len(group) > 1:
            which = f"lesson {number}" if number else "one lesson, or for lessons that they do not tell"
            message = f"{student} has handed in several notebooks for {which}: keep the one that counts"
            problems.append(Problem(message, _shown(group), student))
        kept += [replace(item, lesson=number, notes=(*item.notes, *note)) for item in group if len(group) == 1]
    return kept


def _grouped(theirs: list[_Item], lesson: str | None) -> dict[str | None, list[_Item]]:
    """A student's notebooks by lesson; those of no lesson only where there are no others."""
    mine = [item for item in theirs if not lesson or item.lesson in (None, lesson)]
    if lesson and len(mine) == 1:
        return {lesson: mine}
    groups = defaultdict(list)
    for item in mine:
        groups[item.lesson or _hint(item.entry)].append(item)
    if lesson:
        return {lesson: groups[lesson] or groups[None]}
    if len(groups) > 1:
        groups.pop(None, None)
    return groups


def _hint(entry: Entry) -> str | None:
    """The lesson that a notebook's content speaks of."""
    try:
        notebook = read_limited(entry.chunks())
    except Unreadable:
        return None
    return notebook.lesson if notebook.lesson in registry.lessons() else by_names(notebook)


def by_names(notebook: Notebook) -> str | None:
    """The lesson most of whose exercises' names a notebook defines."""
    votes: Counter[str] = Counter()
    for cell in notebook.cells:
        for name in re.findall(r"^(?:def|class)[ \t]+(\w+)", cell.source, re.MULTILINE):
            votes.update(_names().get(name, ()))
    best = votes.most_common(2)
    return best[0][0] if best and (len(best) == 1 or best[0][1] > best[1][1]) else None


@cache
def _names() -> dict[str, set[str]]:
    names = defaultdict(set)
    for exercise in registry.exercises():
        for name in exercise.names:
            names[name].add(exercise.id.partition(".")[0])
    return names


# What is left, and the ids.


def _shown(items: list[_Item]) -> tuple[str, ...]:
    return tuple(item.entry.shown for item in items[:20])


def _empty(items: list[_Item], folders: Folders, root: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The folders at the top, where each is a student's, from which no notebook came."""
    notebooks = [item.entry.parts for item in items if item.entry.notebook]
    if notebooks and all(len(parts) == len(root) + 1 for parts in notebooks):
        return []
    full = {parts[: len(root) + 1] for parts in notebooks}
    return sorted(f for f in folders - full if len(f) == len(root) + 1 and f[:-1] == root)


def _left_over(items: list[_Item], empty: list[tuple[str, ...]], problems: list[Problem]) -> None:
    """Students who have handed in something, but no notebook; nobody is passed over in silence."""
    served = {item.owner for item in items if item.entry.notebook}
    strays = defaultdict(list)
    for item in items:
        if item.owner not in served and item.entry.parts[-1].lower().endswith(STRAYS):
            strays[item.owner].append(item)
    for owner, theirs in strays.items():
        message = "handed in without a notebook (a file whose name ends in .ipynb)"
        problems.append(Problem(message, _shown(theirs), ident(owner)))
    told = {name for problem in problems for name in problem.files}
    for folder in empty:
        name = plain("/".join(folder))
        if not any(other == name or other.startswith(f"{name}/") for other in told):
            owner = _item(Entry((*folder, "any"), Path()), (folder[-1], "any")).owner
            problems.append(Problem("the folder holds no notebook", (name,), ident(owner)))


def _found(items: list[_Item], problems: list[Problem], roster: Roster | None, secret: bytes | None) -> Found:
    """The submissions, sorted by id, no two of one id."""
    public = {ident(item.owner): item.owner for item in items}
    public |= {
        problem.student: problem.student for problem in problems if problem.student and problem.student not in public
    }
    code = {student: _anonymous(student, secret) if secret else student for student in public}
    missing = tuple(s.id for s in roster.students if ident(s.id) not in code) if roster else ()
    made = defaultdict(list)
    for item in items:
        student = code[ident(item.owner)]
        id = f"{student}-{item.lesson or 'none'}"
        entry = item.entry
        made[id.casefold()].append(Submission(id, student, item.lesson, entry.path, entry.member, item.notes))
    for same in [same for same in made.values() if len(same) > 1]:
        files = tuple(str(s.member or s.path) for s in same)
        problems.append(Problem(f"several submissions would have the id {same[0].id}", files, same[0].student))
    if not items and not problems:
        problems.append(Problem("there is no notebook (.ipynb) here"))
    submissions = tuple(sorted((same[0] for same in made.values() if len(same) == 1), key=lambda s: s.id))
    told = tuple(replace(p, student=code.get(p.student, p.student)) for p in problems)
    if secret:
        listed = {one.id: ident(one.id) for one in roster.students} if roster else {}
        known = {name: _anonymous(id, secret) for raw, id in listed.items() for name in (raw, id)}
        known |= code | {owner: code[student] for student, owner in public.items()}
        told = tuple(_nameless(problem, known) for problem in told)
    return Found(submissions, told, {code[student]: owner for student, owner in public.items()}, missing)


def _nameless(problem: Problem, code: dict[str, str]) -> Problem:
    """With codes for the names in its message. Its files stay: whoever shows it leaves them out."""
    known = sorted(code, key=len, reverse=True)
    pattern = "|".join(map(re.escape, known)) or r"(?!)"
    said = re.sub(rf"(?<![\w.-])({pattern})(?![\w-])", lambda found: code[found[1]], problem.message)
    return replace(problem, message=said)


def _anonymous(student: str, secret: bytes) -> str:
    """The same for one student in every batch with this secret."""
    key = secret if isinstance(secret, bytes) else str(secret).encode()
    return f"s-{hmac.new(key, student.encode(), hashlib.sha256).hexdigest()[:8]}"

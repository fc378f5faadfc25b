"""Who is who: a roster in CSV, and what Gradescope writes beside an export."""

import csv
import io
import os
import re
import unicodedata
from dataclasses import dataclass

from .intake import MB, Unreadable, open_regular


@dataclass(frozen=True)
class Student:
    """A line of the roster: `file` is the path, or a folder or a file name of it, that this student handed in."""

    id: str
    name: str = ""
    file: str = ""


class Roster:
    """CSV with a first line of column names: id, and where they help, name and file."""

    def __init__(self, students: list[Student]):
        self.students = students
        self._by: dict[tuple[str, str], set[str]] = {}
        for student in students:
            keys = [
                ("id", student.id.casefold()),
                ("file", student.file),
                *(("name", key) for key in _names(student.name)),
            ]
            for key in keys:
                if key[1]:
                    self._by.setdefault(key, set()).add(student.id)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Roster":
        """Raises ValueError with what is wrong with the file."""
        try:
            with open_regular(os.path.realpath(path)) as file:
                text = file.read(10 * MB).decode("utf-8-sig")
            head = text.partition("\n")[0]
            delimiter = max(",;\t", key=head.count)
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        except (Unreadable, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"the roster cannot be read ({error}): it is CSV in UTF-8 with a column id") from None
        rows = [{(key or "").strip().lower(): str(value or "").strip() for key, value in row.items()} for row in rows]
        if not rows or not all(row.get("id") for row in rows):
            raise ValueError("the roster needs a column id, with an entry in each line")
        students = [Student(row["id"], row.get("name", ""), row.get("file", "")) for row in rows]
        ids = [student.id.casefold() for student in students]
        twice = sorted({id for id in ids if ids.count(id) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise ValueError(f"the roster has these ids twice: {', '.join(twice[:10])}")
        return cls(students)

    def find(self, owner: str, parts: tuple[str, ...]) -> set[str]:
        """The ids that a file may belong to: by its path, else its owner's id, a part of that, else their name."""
        ways = [
            [("file", "/".join(parts)), *(("file", part) for part in parts)],
            [("id", owner.casefold())],
            [("id", piece.casefold()) for piece in owner.split("_")],
            [("name", key) for key in (*_names(owner), *_names(re.sub(r"[_\d]+$", "", owner)))],
        ]
        for keys in ways:
            found = set().union(*(self._by.get(key, set()) for key in keys))
            if found:
                return found
        return set()


def _names(name: str) -> set[str]:
    """Ways to write a name in one word: Canvas has lovelaceada, Moodle Ada Lovelace."""
    text = unicodedata.normalize("NFKD", name).casefold()
    words = re.findall(r"[^\W\d_]+", "".join(c for c in text if not unicodedata.combining(c)))
    return {"".join(words), "".join(words[-1:] + words[:-1]), "".join(words[1:] + words[:1])} - {""}


def gradescope(data: bytes) -> dict[str, tuple[str, ...]]:
    """{folder: its submitters' ids} from submission_metadata.yml; an id is the sid, else the address, else the name."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """Plain data; what Ruby adds of its own becomes nothing."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        whole = yaml.load(data, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"submission_metadata.yml cannot be read ({type(error).__name__})") from None
    found = {}
    for folder, about in whole.items() if isinstance(whole, dict) else ():
        people = _entry(about, "submitters")
        people = people if isinstance(people, list) else []
        ids = [next((str(v) for key in ("sid", "email", "name") if (v := _entry(p, key))), "") for p in people]
        found[str(folder)] = tuple(id for id in ids if id)
    return found


def _entry(mapping: object, key: str) -> object:
    """Ruby's symbols are keys with a colon before them."""
    return mapping.get(f":{key}", mapping.get(key)) if isinstance(mapping, dict) else None

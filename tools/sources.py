"""Where each row of the lecture sources is taught and tested: docs/coverage.yaml -> docs/coverage.md, docs/errata.md.

python tools/sources.py            write both pages; say what is wrong with the pointers, and exit with 1 if anything is
python tools/sources.py --check    write nothing; a page that is not what the file gives is wrong as well

The file is written by hand. A pointer is an exercise, "04.5", or "04: some words": words that stand in exactly one cell
of lesson 04 as students get it. So it survives new cells, other numbers and other sections, and dies if the words go.
What a row or an erratum may hold is explained at the head of the file.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated

try:
    import typer
    import yaml
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed. The pages are written with what comes by: pip install -e '.[test,grade]'")

ROOT = Path(__file__).resolve().parents[1]
EXERCISE = re.compile(r"\d\d\.\d+[a-z]?")
WORDS = re.compile(r"(\d\d): (.+)", re.DOTALL)
TEST = re.compile(r"(test_\w+\.py)::(test_\w+)")
FEWEST = 8  # characters: shorter words are too easily found elsewhere
VERDICTS = ("right", "convention", "imprecise", "wrong", "empirical", "topic", "question")
ROW = {"topic", "verdict", "at", "test", "errata", "items", "lesson", "open"}
ERRATUM = {"title", "said", "correct", "at", "shows", "test", "lesson", "open"}
WARNING = "<!-- Written by tools/sources.py from docs/coverage.yaml: edit that, and run it. -->"


class Dead(ValueError):
    """A pointer that leads nowhere, or to several places; the message says which."""


@dataclass(frozen=True)
class Cell:
    """A cell as students get it, with what the solution's run printed below it."""

    lesson: str
    id: str
    source: str
    output: str
    compared: bool  # the tests compare its output with that of a fresh run
    above: str  # the section in which it begins

    @cached_property
    def on_one_line(self) -> str:
        return _one_line(self.source)

    def section(self, words: str) -> str:
        """The section in which the words stand: a cell of text may hold several."""
        at = self.source.find(words) if words in self.source else len(self.source)
        headings = re.finditer(r"(?m)^## (.+)$", self.source)
        return [self.above, *(heading[1] for heading in headings if heading.start() <= at)][-1]


class Lessons:
    """All cells of notebooks/, by lesson, with the outputs that solutions/ have."""

    def __init__(self, root: Path):
        self.files = {path.name[:2]: path for path in sorted((root / "notebooks").glob("*.ipynb"))}
        self.root = root

    @cached_property
    def cells(self) -> dict[str, list[Cell]]:
        return {number: list(self._read(number)) for number in self.files}

    def _read(self, number: str) -> Iterator[Cell]:
        solution = self.root / "solutions" / self.files[number].name
        outputs = {cell["id"]: _printed(cell) for cell in json.loads(solution.read_text("utf-8"))["cells"]}
        section = ""
        for cell in json.loads(self.files[number].read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            compared = "nbval-check-output" in cell["metadata"].get("tags", [])
            yield Cell(number, cell["id"], source, outputs.get(cell["id"], ""), compared, section)
            if cell["cell_type"] == "markdown":
                section = [section, *re.findall(r"(?m)^## (.+)$", source)][-1]

    def find(self, pointer: str) -> tuple[Cell, str]:
        """The cell of a pointer, and its words ("" for an exercise). Raises Dead."""
        words = WORDS.fullmatch(pointer)
        if EXERCISE.fullmatch(pointer):
            number, name, text = pointer[:2], pointer.replace(".", "-") + "-check", ""
            found = [cell for cell in self.cells.get(number, []) if cell.id == name]
        elif words:
            number, text = words[1], words[2]
            if len(text) < FEWEST:
                raise Dead(f"{pointer!r} is too short to point to anything")
            found = [cell for cell in self.cells.get(number, []) if _one_line(text) in cell.on_one_line]
        else:
            raise Dead(f"{pointer!r} is neither an exercise like 04.5 nor words like '04: the tilt'")
        if number not in self.cells:
            raise Dead(f"{pointer!r}: there is no lesson {number}")
        if len(found) != 1:
            where = f" ({', '.join(cell.id for cell in found)})" if found else ""
            raise Dead(f"{pointer!r} stands in {len(found)} cells of lesson {number}{where}")
        return found[0], text

    def cites(self, number: str, source: str) -> bool:
        """Whether the lesson names this among its sources."""
        return any(source in cell.source.partition("**Sources.**")[2] for cell in self.cells.get(number, []))


def _printed(cell: dict) -> str:
    texts = []
    for output in cell.get("outputs", []):
        for text in (output.get("text"), output.get("data", {}).get("text/plain")):
            texts.append("".join(text or ""))
    return "\n".join(texts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- what is wrong ----------------------------------------------------------------------------------------------------


def load(root: Path = ROOT) -> dict:
    """docs/coverage.yaml."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is
    return yaml.load((root / "docs" / "coverage.yaml").read_text("utf-8"), Loader=loader)


def problems(data: dict, lessons: Lessons) -> list[str]:
    """All that is wrong with the file's entries: "S0.3: ..."."""
    found = []
    for name, entry in entries(data):
        allowed = ERRATUM if name in data["errata"] else ROW
        found += [f"{name}: {key!r} means nothing here" for key in entry.keys() - allowed]
        found += [f"{name}: {told}" for told in _problems(data, lessons, name, entry)]
    return found


def entries(data: dict) -> Iterator[tuple[str, dict]]:
    """Rows and errata, by name."""
    yield from data["rows"].items()
    yield from data["errata"].items()


def _problems(data: dict, lessons: Lessons, name: str, entry: dict) -> Iterator[str]:
    for key in ("title", "said", "correct") if name in data["errata"] else ("topic", "verdict"):
        if not entry.get(key):
            yield f"it has no {key}"
    if name in data["rows"] and entry.get("verdict") not in VERDICTS:
        yield f"its verdict is {entry.get('verdict')!r}, not one of {', '.join(VERDICTS)}"
    yield from (f"there is no erratum {e}" for e in entry.get("errata", []) if e not in data["errata"])

    cells = []
    for pointer in [*entry.get("at", []), *entry.get("items", [])]:
        try:
            cells.append(lessons.find(pointer)[0])
        except Dead as error:
            yield str(error)
    if "open" in entry:
        if not (entry["open"] and re.fullmatch(r"\d\d", str(entry.get("lesson")))):
            yield "what is open says what is missing, and the lesson it is for"
        return
    if not entry.get("at"):
        yield "it points to no lesson"
    if not entry.get("test"):
        yield "it names no test"
    for test in entry.get("test", []):
        yield from _problems_of_test(lessons, test, cells)
    for number in entry.get("shows", []):
        if not any(_one_line(number) in _one_line(part) for cell in cells for part in (cell.source, cell.output)):
            yield f"none of its cells shows {number!r}"
    if entry.get("verdict") == "question":
        for pointer in entry.get("items") or ["nothing"]:
            if not EXERCISE.fullmatch(pointer) and not re.search(r"guess_\w+", pointer):
                yield f"{pointer!r} is no item that is checked: neither an exercise nor a prediction"


def _problems_of_test(lessons: Lessons, test: str, cells: list[Cell]) -> Iterator[str]:
    in_file = TEST.fullmatch(test)
    if test == "prose":
        return
    if test == "printed":
        if not any(cell.compared for cell in cells):
            yield "the tests compare the output of none of its cells"
    elif test.startswith("cited: "):
        if not any(lessons.cites(cell.lesson, test.removeprefix("cited: ")) for cell in cells):
            yield f"none of its lessons names {test.removeprefix('cited: ')!r} among its sources"
    elif in_file:
        if in_file[2] not in _functions(lessons.root / "tests" / in_file[1]):
            yield f"there is no test tests/{test}"
    elif EXERCISE.fullmatch(test):
        try:
            lessons.find(test)
        except Dead as error:
            yield str(error)
    else:
        yield f"{test!r} is no kind of test"


@cache
def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8")) if file.exists() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


# --- pages ------------------------------------------------------------------------------------------------------------


def pages(data: dict, lessons: Lessons) -> dict[str, str]:
    """The text of both pages, by the name of the file in docs/. The pointers must be alive."""
    return {"coverage.md": _coverage(data, lessons), "errata.md": _errata(data, lessons)}


def _coverage(data: dict, lessons: Lessons) -> str:
    lines = [WARNING, "", "# What the lecture sources teach, and where it is here", ""]
    lines += [
        "Five public lecture documents are the sources of this course. Every statement, formula, figure and question "
        "of theirs has a row below, in our words: where a lesson takes it up (§: section), and what holds it in place. "
        "Verdicts are those of our audit: *right*; *convention* (right under a convention that must be said); "
        "*imprecise*; *wrong* as written; *empirical* (a published measurement); *topic* (nothing to verify); "
        "*question*. [errata.md](errata.md) explains the E-numbers.",
        "",
        "Tests: the number of an exercise means its check and all known wrong answers to it, which the check must "
        "refuse; *printed*: a cell whose output every run of the tests compares; `test_...`: a test of the package; "
        "*cited*: read in the source that the lesson names; *prose*: nothing to compute.",
        "",
        "| source | rows | taught | open | wrong or imprecise |",
        "|---|---|---|---|---|",
    ]
    groups = {key: {n: r for n, r in data["rows"].items() if n.startswith(f"{key}.")} for key in data["sources"]}
    for key, rows in [*groups.items(), ("all", data["rows"])]:
        still = sum("open" in row for row in rows.values())
        faulty = sum(row["verdict"] in ("wrong", "imprecise") for row in rows.values())
        lines.append(f"| {key} | {len(rows)} | {len(rows) - still} | {still} | {faulty} |")
    for key, rows in groups.items():
        lines += ["", f"## {key} · {data['sources'][key]}", ""]
        lines += ["| row | what | verdict | where | test | errata |", "|---|---|---|---|---|---|"]
        for name, row in rows.items():
            where = [_places(row.get("at", []), lessons)] if row.get("at") else []
            if "items" in row:
                where.append(f"checked: {_places(row['items'], lessons)}")
            if "open" in row:
                where.append(f"**open**, lesson {row['lesson']}: {row['open']}")
            tests = ", ".join(_test(test) for test in row.get("test", []))
            errata = ", ".join(f"[{e}](errata.md#{e.lower()})" for e in row.get("errata", []))
            cells = [name, row["topic"], row["verdict"], "; ".join(where), tests, errata]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _test(test: str) -> str:
    return f"`{test}`" if "::" in test else test


def _places(pointers: list[str], lessons: Lessons, full: bool = False) -> str:
    """ "04 §5, §7, exercise 04.5", with links; in full with the titles of the sections."""
    found: dict[str, list[str]] = {}
    for pointer in pointers:
        cell, words = lessons.find(pointer)
        title = cell.section(words)
        name = f"exercise {pointer}" if not words else (title or "opening") if full else _short(title)
        found.setdefault(cell.lesson, []).append(name)
    joined = {number: ("; " if full else ", ").join(dict.fromkeys(names)) for number, names in found.items()}
    return "; ".join(f"{_link(number, lessons)} {names}" for number, names in joined.items())


def _short(title: str) -> str:
    number = re.match(r"(\d+)\. ", title)
    return f"§{number[1]}" if number else title or "opening"


def _link(number: str, lessons: Lessons) -> str:
    return f"[{number}](../notebooks/{lessons.files[number].name})"


def _errata(data: dict, lessons: Lessons) -> str:
    lines = [WARNING, "", "# Errata of the lecture sources", ""]
    lines += [
        "Lectures are written in a hurry, and good ones too have slips. These are the ones that we found in our five "
        "sources (S0 to S4, [coverage.md](coverage.md)) while deriving each formula again and computing each number. "
        "*Said* is in our words, often shortened. Each is taken up where the subject is taught, mostly as a question "
        "before the answer; the numbers are what the cell there prints or states.",
    ]
    for name, erratum in data["errata"].items():
        rows = ", ".join(row for row, entry in data["rows"].items() if name in entry.get("errata", []))
        lines += ["", f'<a id="{name.lower()}"></a>', "", f"## {name} · {erratum['title']}", ""]
        lines += [f"**Said** ({rows}): {erratum['said']}" if rows else f"**Said:** {erratum['said']}", ""]
        lines += [f"**Correct:** {erratum['correct']}", ""]
        if erratum.get("at"):
            lines += [f"**Where:** {_places(erratum['at'], lessons, full=True)}", ""]
        if erratum.get("shows"):
            lines += ["**Shown there:**", "", *(f"- `{shown}`" for shown in erratum["shows"]), ""]
        if erratum.get("test"):
            lines += ["**Test:** " + ", ".join(_test(test) for test in erratum["test"]), ""]
        if "open" in erratum:
            lines += [f"**Open**, lesson {erratum['lesson']}: {erratum['open']}", ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing, exit with 1 if pages are out of step")] = False,
    root: Annotated[Path, typer.Option(help="the folder with docs/, notebooks/, solutions/, tests/")] = ROOT,
) -> None:
    """Write docs/coverage.md and docs/errata.md."""
    data, lessons = load(root), Lessons(root)
    wrong = problems(data, lessons)
    for name, text in ({} if wrong else pages(data, lessons)).items():
        file = root / "docs" / name
        if file.exists() and file.read_text("utf-8") == text:
            continue
        if check:
            wrong.append(f"docs/{name} is not what docs/coverage.yaml and the lessons give: python tools/sources.py")
        else:
            file.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote docs/{name}")
    for problem in wrong:
        print(problem, file=sys.stderr)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)

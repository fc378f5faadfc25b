"""condiff_check/grading intake: whatever is handed in becomes a Notebook or a sentence that says what to do."""

import codecs
import gzip
import io
import json
import os
import random
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from condiff_check.grading import intake, listing
from condiff_check.grading.discover import discover, ident, take
from condiff_check.grading.intake import Notebook, Unreadable, read_limited, read_notebook

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(source="x = 1", **more):
    return {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": source} | more


def book(*cells, **more):
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": list(cells)} | more


def as_bytes(tree):
    return json.dumps(tree).encode()


def read(*cells, **more):
    return read_notebook(as_bytes(book(*cells, **more)))


ONE = as_bytes(book(code("def cfg(a, b, s): ...")))


# Good notebooks.


@pytest.mark.parametrize("path", SOLUTIONS + LESSONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_our_own_notebooks_read_as_nbformat_reads_them_and_without_a_note(path):
    notebook = read_limited(path)
    theirs = nbformat.read(path, as_version=4).cells
    right = [(number, cell.id, cell.source) for number, cell in enumerate(theirs, 1) if cell.cell_type == "code"]
    assert [(cell.number, cell.id, cell.source) for cell in notebook.cells] == right
    assert notebook.notes == () and notebook.lesson == path.name[:2]


def test_the_child_and_this_process_read_the_same():
    data = SOLUTIONS[4].read_bytes()
    assert read_limited(data) == read_notebook(data) == read_limited([data[:9], data[9:]])
    assert "skip-grading" in {tag for cell in read_limited(data).cells for tag in cell.tags}


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_of_unicode(coding):
    text = json.dumps(book(code("σ = 'é'")), ensure_ascii=False)
    assert read_notebook(text.encode(coding)).cells[0].source == "σ = 'é'"


def test_format_3_with_worksheets():
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}}
    cells = [
        {"cell_type": "heading", "level": 1, "source": "A"},
        {"cell_type": "code", "language": "python", "input": ["a = 1\n", "b = 2"], "outputs": []},
    ]
    (cell,) = read_notebook(as_bytes(old | {"worksheets": [{"cells": cells}, {"cells": []}, 7]})).cells
    assert (cell.number, cell.source) == (2, "a = 1\nb = 2")


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        (["a = 1\n", "b = 2"], "a = 1\nb = 2"),
        (["a = 1", "b = 2"], "a = 1\nb = 2"),  # a converter that forgot the ends of the lines
        ([], ""),
        ("!pip install -q einops\n%matplotlib inline\n", "!pip install -q einops\n%matplotlib inline\n"),
        ("%%bash\nls", "%%bash\nls"),
        ("x = 1 # 😀", "x = 1 # 😀"),
        ("#@title T\nx = 1 #@param", "#@title T\nx = 1 #@param"),
    ],
)
def test_sources_as_people_s_tools_write_them(source, right):
    notebook = read(code(source))
    assert notebook.cells[0].source == right and notebook.notes == ()


@pytest.mark.parametrize("source", [None, 3, {"a": 1}, ["a", 3], True])
def test_a_source_that_is_no_text_costs_that_cell_alone(source):
    notebook = read(code(source), code("y = 2"))
    assert [(c.number, c.source) for c in notebook.cells] == [(2, "y = 2")] and "cell 1" in notebook.notes[0]


@pytest.mark.parametrize("cell", [None, 3, [], "x", {}, {"cell_type": 4}, {"cell_type": ["code"]}])
def test_a_cell_that_is_no_cell_costs_itself_alone(cell):
    notebook = read(cell, code("y = 2"))
    assert [c.number for c in notebook.cells] == [2] and len(notebook.notes) == 1


def test_what_cannot_stand_in_text_becomes_visible():
    data = b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": "a\\u0000\\ud800\\ud83d\\ude00"}]}'
    notebook = read_limited(data)
    assert notebook.cells[0].source == "a\ufffd\ufffd😀" and "cell 1" in notebook.notes[0]


def test_ids_own_nbgrader_s_colab_s_or_the_number_and_no_two_the_same():
    cells = [
        code(id="04-1-answer"),
        code(metadata={"nbgrader": {"grade_id": "04-2-answer"}}),
        code(metadata={"id": "aB3_x"}),
        code(),
        code(id="04-1-answer"),
        code(id="../../etc"),
        code(id=7),
    ]
    ids = [cell.id for cell in read(*cells).cells]
    assert ids == ["04-1-answer", "04-2-answer", "aB3_x", "cell-4", "04-1-answer.2", "cell-6", "cell-7"]


def test_colab_kaggle_deepnote_and_jupytext_are_harmless():
    meta = {
        "colab": {"provenance": [], "toc_visible": True}, "accelerator": "GPU", "kaggle": {"isGpuEnabled": True},
        "deepnote_notebook_id": "a", "jupytext": {"formats": "ipynb,py:percent"}, "toc": {}, "varInspector": {},
        "kernelspec": {"name": "unknown"}, "widgets": {"application/vnd.jupyter.widget-state+json": {"a": {}}},
    }  # fmt: skip
    odd = code(metadata={"colab": {"base_uri": "x"}, "cellView": "form", "outputId": "q", "deepnote_cell_type": "code"})
    notebook = read(odd, {"cell_type": "raw", "source": "r"}, metadata=meta, nbformat_minor=0)
    assert notebook == Notebook((intake.Cell(1, "cell-1", "x = 1", ()),), (), None)


# Tags and metadata.


@pytest.mark.parametrize("line", ["# grader: skip\ntrain()", "#grader:skip", "\n# grader: skip  \n\n"])
def test_a_comment_in_the_first_line_skips_a_cell(line):
    assert read(code(line)).cells[0].tags == ("skip-grading",)


@pytest.mark.parametrize("line", ["x = 1\n# grader: skip", "# grader: skipper", "'# grader: skip'"])
def test_other_comments_do_not(line):
    assert read(code(line)).cells[0].tags == ()


@pytest.mark.parametrize("tags", [None, "skip-grading", {"skip-grading": 1}, [3, None, ["skip-grading"], "a" * 101]])
def test_tags_of_another_shape_are_none(tags):
    assert read(code(metadata={"tags": tags})).cells[0].tags == ()


def nbgrader(id, **changes):
    answer = id.endswith("answer")
    about = dict(grade_id=id, grade=not answer, solution=answer, locked=not answer, points=2, schema_version=3)
    return {"nbgrader": about | changes}


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (code(id="04-1-answer", metadata={"tags": ["skip-grading"]}), "is tagged skip-grading"),
        (code("# grader: skip\ndef cfg(): ...", id="04-1-answer"), "is tagged skip-grading"),
        (code(id="04-1-check", metadata=nbgrader("04-1-check", points=1e9)), "points was altered"),
        (code(id="04-1-check", metadata=nbgrader("04-1-check", points="9")), "points was altered"),
        (code(id="04-1-check", metadata=nbgrader("04-1-check", locked=False)), "locked was altered"),
        (code(id="04-1-answer", metadata=nbgrader("04-1-answer", solution=False)), "solution was altered"),
        (code(id="04-1-answer", metadata=nbgrader("04-2-answer")), "do not match"),
        (code("def сfg(): ..."), "U+0441"),
        (code("x = 1 # \u202e"), "backwards"),
    ],
)
def test_what_was_altered_is_noted(cell, says):
    notebook = read(cell)
    assert len(notebook.notes) == 1 and says in notebook.notes[0] and len(notebook.cells) == 1


def test_the_course_s_own_metadata_is_not_noted():
    assert read(code(id="04-1-check", metadata=nbgrader("04-1-check"))).notes == ()
    assert read(code("def σ_t(β1, naïve): ...\n# для GPU")).notes == ()


def test_a_cell_that_is_there_twice_is_noted_and_notes_are_few():
    assert "2 times" in read(code(id="04-1-answer"), code(id="04-1-answer")).notes[0]
    assert len(read(*[None] * 500, code()).notes) == intake.NOTES + 1


@pytest.mark.parametrize(
    ("cells", "lesson"),
    [
        ([code(id="04-1-answer"), code(id="04-2-answer"), code(id="03-1-answer")], "04"),
        ([code('f = check("05.2", f)')], "05"),
        ([code(metadata={"exercise": "02.1"})], "02"),
        ([code(id="04-1-answer"), code(id="03-1-answer")], None),
        ([code(id="2024-11-answer")], None),
        ([code()], None),
    ],
)
def test_the_lesson_by_ids_and_checks(cells, lesson):
    assert read(*cells).lesson == lesson


# What is no notebook.

DEEP = b"[" * 200_000
BAD = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t", "is empty"),
    "only a mark": (codecs.BOM_UTF8, "is empty"),
    "zeros": (bytes(5000), "zeros"),
    "log-in page": (b"<!DOCTYPE html>\n<html><title>Log in</title>", "web page"),
    "html in utf-16": ("<html>".encode("utf-16"), "web page"),
    "script": (b"# %%\nimport torch\n\ndef cfg(): ...\n", "Python script"),
    "marimo": (b"import marimo\napp = marimo.App()\n@app.cell\ndef _(): ...", "Python script"),
    "pdf": (b"%PDF-1.7\n\xff\xfe", "PDF"),
    "docx": (b"PK\3\4....[Content_Types].xml..word/document.xml", "Word"),
    "zip": (b"PK\3\4....04_x.ipynb", "zip archive"),
    "gzip": (gzip.compress(ONE), "gzip"),
    "picture": (b"\x89PNG\r\n\x1a\n", "picture"),
    "macOS": (b"\0\5\x16\7\0\2\0\0Mac OS X", "macOS"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git"),
    "merge": (b'{"cells": [\n<<<<<<< HEAD\n1\n=======\n2\n>>>>>>> b\n]}', "conflict"),
    "merge at the start": (b"<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> b\n", "conflict"),
    "truncated": (ONE[:-20], "ends in the middle"),
    "truncated in a string": (ONE[: ONE.index(b"cfg")], "ends in the middle"),
    "latin-1": ('{"cells": "é"}'.encode("latin-1"), "UTF-8"),
    "raw surrogates": (b'{"cells": "\xed\xa0\x80"}', "UTF-8"),
    "text": (b"Dear all", "no notebook"),
    "comma": (ONE[:-1] + b",}", "line 1"),
    "two notebooks": (ONE + ONE, "no valid JSON"),
    "number": (b"7", "no notebook"),
    "list": (b"[]", "no notebook"),
    "object": (b'{"url": "x"}', "no cells"),
    "cells null": (b'{"nbformat": 4, "cells": null}', "no cells"),
    "cells object": (b'{"nbformat": 4, "cells": {}}', "no cells"),
    "format 7": (as_bytes(book(nbformat=7)), "format is 7"),
    "deep": (DEEP, "nested"),
    "deep objects": (b'{"a":' * 100_000, "nested"),
    "deep in the outputs": (as_bytes(book(code()))[:-2] + b',{"outputs":' + DEEP, "nested"),
    "digits": (b'{"cells": ' + b"9" * 10**6 + b"}", "cannot be read"),
    "cells twice": (b'{"nbformat": 4, "cells": [], "cells": []}', "'cells' twice"),
    "source twice": (as_bytes(book(code())).replace(b'"source"', b'"source": "a", "source"'), "'source' twice"),
    "50 MB of code": (as_bytes(book(code("x" * 50_000_000))), "more code"),
    "many cells": (as_bytes(book(*[code("")] * 20_000)), "more code"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_notebook_says_what_it_is_and_what_to_do(name):
    data, says = BAD[name]
    with pytest.raises(Unreadable, match=says) as caught:
        read_limited(data)
    assert not caught.value.ours and len(caught.value.fix) > 10 and len(str(caught.value)) < 250
    assert caught.value.reason.isprintable()


def test_what_jupyter_reads_is_read_though_odd():
    assert read_notebook(ONE.replace(b'"outputs": []', b'"outputs": [{"a": NaN, "b": Infinity}]')).notes == ()
    assert read_notebook(ONE.replace(b'"outputs"', b'"outputs": [1], "outputs"')).notes == ()
    assert read_notebook(ONE.replace(b'"nbformat": 4', b'"nbformat": "four"')).cells
    assert read(*[{"cell_type": "markdown", "source": "a"}] * 100_000, code()).cells[0].number == 100_001


def test_a_file_that_needs_too_much_memory_is_refused():
    with pytest.raises(Unreadable, match="memory"):
        read_limited(b"[" + b"[]," * 30_000_000)


def test_a_reader_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(intake, "SECONDS", 0.3)
    big = as_bytes(book(code(), metadata={"a": [[]] * 3_000_000}))
    with pytest.raises(Unreadable, match="takes more than"):
        read_limited(big)


MEASURE = """
import importlib.util, subprocess, sys, threading, time
spec = importlib.util.spec_from_file_location("intake", sys.argv[1])
intake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(intake)
def peak():  # not ru_maxrss, which begins with the peak of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before, start = peak(), time.perf_counter()
notebook = intake.read_limited(sys.argv[2])
print(len(notebook.cells), peak() - before, time.perf_counter() - start, *notebook.notes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by Linux")
def test_100_mb_of_outputs_cost_the_parent_nothing(tmp_path):
    picture = {"output_type": "display_data", "data": {"image/png": "A" * 2_000_000}, "metadata": {}}
    path = tmp_path / "large.ipynb"
    path.write_bytes(as_bytes(book(*[code(f"x = {i}", outputs=[picture]) for i in range(50)])))
    command = [sys.executable, "-I", "-c", MEASURE, intake.__file__, path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cells, grown, _, *notes = said.split()
    assert int(cells) == 50 and int(grown) < 8_000  # kB
    assert "100 MB" in " ".join(notes)


def test_the_child_imports_nothing_heavy_and_writes_nothing_but_its_answer(tmp_path):
    command = [sys.executable, "-I", "-S", "-X", "importtime", intake.__file__]
    done = subprocess.run(command, input=ONE, capture_output=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["cells"][0][0] == 1
    for heavy in (b"torch", b"dataclasses", b"subprocess", b"condiff", b"asyncio", b"site\n"):
        assert heavy not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"unreadable": 3}',
        b'{"cells": [[1]]}',
        b'{"cells": [], "notes": 4}',
        DEEP,
        b"\xff",
    ],
)
def test_an_answer_of_the_child_that_is_none_is_refused(answer):
    with pytest.raises(Unreadable, match="more memory or time"):
        intake._understand(answer)


# Any bytes at all.


def survives(data, reader=read_notebook):
    """A notebook of plain text, or Unreadable; anything else is an error."""
    notebook = problem = None
    try:
        notebook = reader(data)
    except Unreadable as error:
        problem = str(error)
    if notebook is None:
        assert problem.isprintable() and len(problem) < 300
        return
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert isinstance(cell.number, int) and "\0" not in cell.source and "\r" not in cell.source
        "".join((cell.id, cell.source, *cell.tags)).encode()
    assert all(note.isprintable() and len(note) <= 300 for note in notebook.notes)


FUZZ = settings(
    deadline=None, suppress_health_check=list(HealthCheck), max_examples=100, derandomize=True, database=None
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
WORDS = [
    "cells",
    "source",
    "cell_type",
    "metadata",
    "tags",
    "nbgrader",
    "grade_id",
    "points",
    "id",
    "nbformat",
    "input",
]
KEYS = st.sampled_from([*WORDS, "worksheets"]) | st.text(max_size=3)
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=5) | st.dictionaries(KEYS, t, max_size=6), max_leaves=30)
CODE = st.fixed_dictionaries(
    {"cell_type": st.just("code")}, optional=dict.fromkeys(("source", "metadata", "id"), TREES)
)


@FUZZ
@given(st.binary(max_size=300))
def test_random_bytes(data):
    survives(data)


@FUZZ
@given(TREES)
def test_random_json(tree):
    survives(json.dumps(tree).encode())


@FUZZ
@given(st.lists(CODE | TREES, max_size=6), TREES)
def test_random_notebooks(cells, meta):
    survives(as_bytes(book(*cells, metadata=meta)))
    survives(as_bytes({"nbformat": 3, "worksheets": [{"cells": cells}]}))


REAL = SOLUTIONS[0].read_bytes()


@FUZZ
@given(st.randoms(use_true_random=False), st.integers(1, 20))
def test_real_notebooks_with_wrong_bytes(chance, times):
    survives(mutated(chance, times))


def mutated(chance: random.Random, times):
    data = bytearray(REAL)
    for _ in range(times):
        at, width = chance.randrange(len(data)), chance.choice((1, 1, 1, 50, 5000))
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + width] = chance.randbytes(width)
        elif kind == 1:
            del data[at : at + width]
        elif kind == 2:
            data[at:at] = data[chance.randrange(len(data)) :][:width]
        else:
            data[at : at + 1] = chance.choice((b"[", b"{", b'"', b"null", b"\\ud800", b"\0", b"1e999", b"\xff", b"}"))
    return bytes(data)


def test_the_limited_reader_survives_the_same():
    chance = random.Random(5)
    for _ in range(15):
        survives(mutated(chance, 5), read_limited)


# Whose is it, and for which lesson?


def fill(root, *names, data=ONE):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def zipped(path, *names, data=ONE, root=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(root + name, data)
    return path


def who(found):
    assert all(isinstance(problem.message, str) for problem in found.problems)
    return {(s.student, s.lesson) for s in found.submissions}


def clean(found):
    assert found.problems == ()
    return who(found)


LAYOUTS = {
    "flat": (["ada.ipynb", "bob.ipynb"], {("ada", "04"), ("bob", "04")}),
    "flat, numbered": (["04_ada.ipynb", "04-bob (2).ipynb"], {("ada", "04"), ("bob", "04")}),
    "folders": (["ada/hw.ipynb", "bob/04_cfg.ipynb"], {("ada", "04"), ("bob", "04")}),
    "nbgrader": (
        ["submitted/ada/cfg/hw.ipynb", "submitted/bob/cfg/hw.ipynb", "source/cfg/hw.ipynb", "gradebook.db"],
        {("ada", "04"), ("bob", "04")},
    ),
    "Canvas": (
        ["lovelaceada_12345_67890_hw1 (2).ipynb", "boole_late_12346_67891_04_cfg-1.ipynb"],
        {("lovelaceada_12345", "04"), ("boole_12346", "04")},
    ),
    "Moodle": (
        ["Ada Lovelace_123_assignsubmission_file_/x.ipynb", "Émile B_124_assignsubmission_file/04_x.ipynb"],
        {("Ada-Lovelace_123", "04"), ("Emile-B_124", "04")},
    ),
    "Moodle, flat": (["Ada L_123_assignsubmission_file_x.ipynb"], {("Ada-L_123", "04")}),
    "a folder around": (["submissions/ada/x.ipynb", "submissions/bob/x.ipynb"], {("ada", "04"), ("bob", "04")}),
    "litter": (
        ["ada.ipynb", "._ada.ipynb", "__MACOSX/._ada.ipynb", ".ipynb_checkpoints/ada-checkpoint.ipynb", ".DS_Store"],
        {("ada", "04")},
    ),
    "companions": (["ada/x.ipynb", "ada/torch.py", "ada/numpy/__init__.py", "ada/report.pdf"], {("ada", "04")}),
}


@pytest.mark.parametrize("zip", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name, zip):
    names, right = LAYOUTS[name]
    place = zipped(tmp_path / "all.zip", *names) if zip else fill(tmp_path, *names)
    found = discover(place, lesson="04")
    assert clean(found) == right
    assert all(take(s).notebook.cells[0].source.startswith("def cfg") for s in found.submissions)
    assert {s.id for s in found.submissions} == {f"{student}-04" for student, _ in right}


@pytest.mark.parametrize("zip", [False, True], ids=["folder", "zip"])
def test_a_gradescope_export(tmp_path, zip):
    names = ["submission_1/04_x.ipynb", "submission_2/04_x.ipynb", "submission_3/04_x.ipynb"]
    about = """
submission_1:
  :submitters:
  - :name: Ada
    :sid: '17'
    :email: ada@x.org
  :results: !ruby/hash:Odd {a: 1}
submission_2:
  :submitters:
  - :name: Bob
    :sid:
    :email: bob@x.org
  - :name: Eve
    :sid: '19'
"""
    root = "assignment_99_export/"
    if zip:
        place = zipped(tmp_path / "e.zip", *names, root=root)
        with zipfile.ZipFile(place, "a") as archive:
            archive.writestr(f"{root}submission_metadata.yml", about)
    else:
        place = fill(tmp_path, *(root + name for name in names))
        (place / root / "submission_metadata.yml").write_text(about)
    found = discover(place)
    assert clean(found) == {("17", "04"), (ident("bob@x.org"), "04"), ("submission_3", "04")}
    assert found.names[ident("bob@x.org")] == "bob@x.org"
    assert [len(s.notes) for s in sorted(found.submissions, key=lambda s: s.path.parts)].count(1) == 1


def test_a_gradescope_export_with_broken_metadata_still_counts(tmp_path):
    fill(tmp_path, "submission_1/04_x.ipynb")
    (tmp_path / "submission_metadata.yml").write_text("a: [")
    found = discover(tmp_path)
    assert who(found) == {("submission_1", "04")} and len(found.problems) == 1


def test_a_single_notebook_and_a_lesson_by_content(tmp_path):
    fill(tmp_path, "ada.ipynb", data=as_bytes(book(code('cfg = check("04.1", cfg)'))))
    assert clean(discover(tmp_path / "ada.ipynb")) == {("ada", "04")}
    fill(tmp_path, "bob.ipynb", data=as_bytes(book(code("def convert_scale(): ...\ndef interval_eps(): ..."))))
    fill(tmp_path, "eve.ipynb", data=b"<html>")
    fill(tmp_path, "77_joe.ipynb")  # cfg alone is of lesson 04 as well; there is no lesson 77
    found = discover(tmp_path)
    assert clean(found) == {("ada", "04"), ("bob", "04"), ("eve", None), ("77_joe", "04")}
    (eve,) = [s for s in found.submissions if s.student == "eve"]
    assert eve.id == "eve-none" and take(eve).notebook is None and "web page" in str(take(eve).problem)


def test_all_lessons_of_a_term(tmp_path):
    fill(tmp_path, "ada/03_x.ipynb", "ada/04_y.ipynb", "bob/03_x.ipynb", "eve/05/work.ipynb")
    assert clean(discover(tmp_path)) == {("ada", "03"), ("ada", "04"), ("bob", "03"), ("eve", "05")}
    found = discover(tmp_path, lesson="04")
    assert who(found) == {("ada", "04")}
    assert {p.student for p in found.problems} == {"bob", "eve"} and "nothing for lesson 04" in str(found.problems[0])


def test_resubmissions_are_reported_and_none_is_graded(tmp_path):
    fill(tmp_path, "ada/hw (1).ipynb", "ada/hw (2).ipynb", "bob/04_a.ipynb", "bob/old/04_a.ipynb", "eve/x.ipynb")
    found = discover(tmp_path, lesson="04")
    assert who(found) == {("eve", "04")} and {p.student for p in found.problems} == {"ada", "bob"}
    assert found.problems[0].files == ("ada/hw (1).ipynb", "ada/hw (2).ipynb")
    flat = fill(tmp_path / "flat", "ada.ipynb", "ada (1).ipynb", "bob.ipynb")
    found = discover(flat, lesson="04")
    assert who(found) == {("bob", "04")} and len(found.problems) == 1


def test_a_scratch_notebook_beside_the_answer_is_left_out_with_a_note(tmp_path):
    fill(tmp_path, "ada/04_cfg.ipynb")
    fill(tmp_path, "ada/scratch.ipynb", data=as_bytes(book(code("print(1)"))))
    for lesson in (None, "04"):
        (one,) = discover(tmp_path, lesson=lesson).submissions
        assert one.path.name == "04_cfg.ipynb" and "1 more" in one.notes[0]
    fill(tmp_path, "ada/final.ipynb")  # this one could be meant
    assert who(discover(tmp_path, lesson="04")) == set()


def test_ids_that_differ_in_case_or_not_at_all_are_an_error_that_names_both(tmp_path):
    fill(tmp_path, "Ada/04_x.ipynb", "ada/04_x.ipynb", "bob/04_x.ipynb")
    found = discover(tmp_path)
    assert who(found) == {("bob", "04")} and found.problems[0].files == ("Ada/04_x.ipynb", "ada/04_x.ipynb")
    fill(tmp_path / "n", "a b.ipynb", "a-b.ipynb", "c.ipynb")
    found = discover(tmp_path / "n", lesson="04")
    assert who(found) == {("c", "04")} and len(found.problems[0].files) == 2


@pytest.mark.parametrize(
    "owner",
    ["-rf", ".hidden", "..", "con", "AUX.x", "com1", "a/b", "a\nb", "a" * 300, "李明", "王芳", "", " ", "a\0b", "é",
     "a\udc80b", "x.", "a:b", "💥", "%s", "$(id)", "ada@x.org"],
)  # fmt: skip
def test_ids_fit_any_system(owner):
    id = ident(owner)
    assert 0 < len(id) <= 96 and id[0] not in "-." and id[-1] not in "-."
    assert set(id) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert id.partition(".")[0].lower() not in ("con", "prn", "aux", "nul", "com1", "lpt1")
    assert ident(id) == id


def test_ids_do_not_collide_where_letters_are_lost():
    assert len({ident(name) for name in ("李明", "王芳", "a/b", "a:b", "a-b", "a" * 300, "a" * 301)}) == 7
    assert ident("Zoë Müller") == "Zoe-Muller" and ident("ada_12") == "ada_12"


def test_anonymised(tmp_path):
    fill(tmp_path, "ada/03_x.ipynb", "ada/04_x.ipynb", "bob/04_x.ipynb", "eve/04_x.ipynb", "eve/04_y.ipynb")
    found = discover(tmp_path, anonymise=b"secret")
    shown = {s.student for s in found.submissions} | {p.student for p in found.problems}
    assert len(shown) == 3 and all(len(name) == 10 and name.startswith("s-") for name in shown)
    assert {found.names[name] for name in shown} == {"ada", "bob", "eve"}
    again = discover(tmp_path, lesson="04", anonymise=b"secret").names
    assert (
        again.items() <= found.names.items() and not again.keys() & discover(tmp_path, anonymise=b"other").names.keys()
    )


def test_a_roster_names_students_by_file_id_or_name(tmp_path):
    roster = tmp_path / "roster.csv"
    lines = ["ID;Name;File", "s1;Ada Lovelace;", "s2;George Boole;", "s3;Emmy Noether;final.ipynb", "s4;Kurt;", "555;;"]
    roster.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    names = ["lovelaceada_123_4567_x.ipynb", "s2.ipynb", "final.ipynb", "x_555_6666_y.ipynb", "stranger.ipynb"]
    found = discover(fill(tmp_path / "all", *names), lesson="04", roster=roster)
    assert clean(found) == {(s, "04") for s in ("s1", "s2", "s3", "555", "stranger")} and found.missing == ("s4",)
    (stranger,) = [s for s in found.submissions if s.student == "stranger"]
    assert stranger.notes == ("its student is not in the roster",)
    found = discover(fill(tmp_path / "f", "George Boole_9_assignsubmission_file_/a.ipynb"), lesson="04", roster=roster)
    assert clean(found) == {("s2", "04")}


@pytest.mark.parametrize("text", ["", "name\nada\n", "id\na\nA\n", "id,name\n,ada\n", "\xff"])
def test_a_roster_that_cannot_be_used(tmp_path, text):
    (tmp_path / "r.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="roster"):
        discover(tmp_path, roster=tmp_path / "r.csv")


def test_a_name_that_two_students_have_is_reported(tmp_path):
    (tmp_path / "r.csv").write_text("id,name\ns1,Li Wei\ns2,Wei Li\n")
    found = discover(fill(tmp_path / "a", "Li Wei/x.ipynb"), lesson="04", roster=tmp_path / "r.csv")
    assert not found.submissions and "s1 or s2" in str(found.problems[0]) and len(found.problems) == 1


def test_nobody_is_passed_over_in_silence(tmp_path):
    fill(tmp_path, "ada/04_x.ipynb", "bob/report.pdf", "eve/x.ipynb.txt")
    (tmp_path / "joe").mkdir()
    found = discover(tmp_path)
    assert who(found) == {("ada", "04")} and {p.student for p in found.problems} == {"bob", "eve", "joe"}
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "none", tmp_path / "a\0b"):
        found = discover(place)
        assert not found.submissions and len(found.problems) == 1


# Odd files and folders.


def test_links_pipes_and_odd_names_in_folders(tmp_path):
    fill(tmp_path / "all", "ada.ipynb", "bob\n\x1b[31m.ipynb", "x" * 249 + ".ipynb", "-rf.ipynb")
    fill(tmp_path, "secret.ipynb", "away/eve.ipynb")
    os.symlink(tmp_path / "secret.ipynb", tmp_path / "all/linked.ipynb")
    os.symlink(tmp_path / "away", tmp_path / "all/folder")
    os.symlink(tmp_path / "all", tmp_path / "all/loop")
    os.mkfifo(tmp_path / "all/pipe.ipynb")
    with open(bytes(tmp_path / "all") + b"/\xff.ipynb", "wb") as file:
        file.write(ONE)
    found = discover(tmp_path / "all", lesson="04")
    assert len(found.submissions) == 5 and all(take(s).notebook for s in found.submissions)
    assert sorted(p.files[0] for p in found.problems) == ["folder", "linked.ipynb", "loop", "pipe.ipynb"]
    shown = [str(p) for p in found.problems] + [s.id for s in found.submissions]
    assert all(text.isprintable() for text in shown)


def test_a_file_that_vanishes_or_becomes_a_link_in_between_is_not_the_student_s_fault(tmp_path):
    fill(tmp_path, "ada.ipynb", "bob.ipynb")
    found = discover(tmp_path, lesson="04")
    (tmp_path / "ada.ipynb").unlink()
    (tmp_path / "bob.ipynb").unlink()
    (tmp_path / "bob.ipynb").symlink_to("/etc/passwd")
    for submission in found.submissions:
        taken = take(submission)
        assert taken.notebook is None and taken.problem.ours and taken.sha256 == ""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_what_may_not_be_read(tmp_path):
    fill(tmp_path, "ada/04_x.ipynb", "bob/04_x.ipynb")
    os.chmod(tmp_path / "ada/04_x.ipynb", 0)
    os.chmod(tmp_path / "bob", 0)
    try:
        if os.geteuid() == 0:
            pytest.skip("root may read all: run as an ordinary user")
        found = discover(tmp_path)
        assert "Permission denied" in str(found.problems[0]) and "bob" in str(found.problems[0])
        assert take(found.submissions[0]).problem.ours
    finally:
        os.chmod(tmp_path / "bob", stat.S_IRWXU)


def test_a_hash_is_of_the_bytes_that_were_read(tmp_path):
    import hashlib

    fill(tmp_path, "ada.ipynb", data=REAL)
    fill(tmp_path, "bob.ipynb", data=REAL[:-9])
    for submission in discover(tmp_path, lesson="00").submissions:
        assert take(submission).sha256 == hashlib.sha256(submission.path.read_bytes()).hexdigest()


def test_a_sparse_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "ada.ipynb", "wb") as file:
        file.truncate(2**34)
    (one,) = discover(tmp_path, lesson="04").submissions
    assert "17180 MB" in str(take(one).problem)


# Zips.


def odd_zip(path, *members):
    """members: (name, data, change of the ZipInfo)"""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.ipynb", ONE)
        for name, data, change in members:
            info = zipfile.ZipInfo("plain.ipynb")
            info.filename, info.compress_type, info.create_system = name, zipfile.ZIP_DEFLATED, 3
            change(info)
            archive.writestr(info, data)
    return path


def nothing(info):
    pass


def link(info):
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("name", "data", "change", "says"),
    [
        ("../../evil.ipynb", ONE, nothing, "out of the zip"),
        ("/etc/evil.ipynb", ONE, nothing, "out of the zip"),
        ("..\\evil.ipynb", ONE, nothing, "out of the zip"),
        ("C:/evil.ipynb", ONE, nothing, "out of the zip"),
        ("evil.ipynb", b"/etc/passwd", link, "a link"),
        ("evil.ipynb", bytes(50_000_000), nothing, "zip bomb"),
        ("a/" * 20 + "evil.ipynb", ONE, nothing, "too many folders"),
        ("nested.zip", b"PK\3\4", nothing, "without a notebook"),
    ],
)
def test_zips_with_odd_members(tmp_path, name, data, change, says):
    found = discover(odd_zip(tmp_path / "a.zip", (name, data, change)), lesson="04")
    assert who(found) == {("good", "04")} and len(found.problems) == 1 and says in str(found.problems[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_in_a_zip_twice(tmp_path):
    found = discover(zipped(tmp_path / "a.zip", "ada.ipynb", "ada.ipynb", "bob.ipynb"), lesson="04")
    assert who(found) == {("bob", "04")} and "twice" in str(found.problems[0])


def test_an_encrypted_zip(tmp_path):
    path = zipped(tmp_path / "a.zip", "ada.ipynb")
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    found = discover(path, lesson="04")
    assert not found.submissions and "encrypted" in str(found.problems[0])


def test_a_damaged_zip_costs_the_member_alone(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("ada.ipynb", ONE)
        archive.writestr("bob.ipynb", REAL)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"nbformat", b"nbfXrmat", 1))
    ada, bob = discover(path, lesson="04").submissions
    assert "unpacked" in str(take(ada).problem) and take(ada).sha256 == "" and take(bob).notebook


@pytest.mark.parametrize("cut", [0, 4, 30, 100, -1, -22])
def test_a_zip_that_is_none(tmp_path, cut):
    path = zipped(tmp_path / "a.zip", "ada.ipynb")
    path.write_bytes(path.read_bytes()[:cut])
    found = discover(path)
    assert not found.submissions and "cannot be used" in str(found.problems[0])


def test_a_zip_of_too_many_entries(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", *(f"{i}.txt" for i in range(3000)), data=b"")
    monkeypatch.setattr(listing, "MAX_ENTRIES", 1000)
    assert "more than 1000 entries" in str(discover(path).problems[0])
    monkeypatch.setattr(listing, "MAX_DIRECTORY", 50_000)
    assert "too long" in str(discover(path).problems[0])
    fill(tmp_path / "many", *(f"{i}.txt" for i in range(1001)))
    assert "more than 1000 files" in str(discover(tmp_path / "many").problems[0])


def test_a_zip_that_would_be_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MAX_TOTAL", 3 * len(ONE) - 1)
    found = discover(zipped(tmp_path / "a.zip", "a.ipynb", "b.ipynb", "c.ipynb"), lesson="04")
    assert not found.submissions and "more than" in str(found.problems[0])


@settings(FUZZ, max_examples=100)
@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_zips_with_wrong_bytes(tmp_path_factory, chance, times):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ada/04_x.ipynb", "bob/04_y.ipynb"):
            archive.writestr(name, ONE)
    data = bytearray(buffer.getvalue())
    for _ in range(times):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    path.write_bytes(data)
    for submission in discover(path, lesson="04").submissions:
        try:
            for _ in listing.Entry((), submission.path, submission.member).chunks():
                pass
        except Unreadable:
            pass

"""Reports: what a class, a student, an instructor, Gradescope and nbgrader receive. An invented class of twelve."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from condiff_check.grading import feedback as words
from condiff_check.grading.feedback import clean, feedback, number, one_line, stopped
from condiff_check.grading.gradescope import no_result, results_json, write_autograder, write_results
from condiff_check.grading.nbgrader_scores import write_csv, write_gradebook
from condiff_check.grading.report_html import isolation_sentences, page_names, write_pages
from condiff_check.grading.results import OUTCOMES, CellRun, FactResult, Graded, Verdict
from condiff_check.grading.rubric import Scored, ScoredVerdict
from condiff_check.grading.tables import mistakes, table, to_csv, write_tables
from condiff_check.registry import lesson

LAYERS = ("user namespace", "no network", "pid namespace", "read-only root", "private tmp 64 MiB", "seccomp", "rlimits")
SECRET_VALUE = "yours is 0.731, due is 0.913"  # what a fact measured on hidden inputs
EVIL = "<script>alert(1)</script></title>\x1b[31mred\x1b]0;title\x07\x9b2J\u202eevil\x00\rend"


def verdict(exercise, outcome="right", *, mistake=0, **changes):
    """One verdict with the facts, mistakes and points of the real exercise."""
    states = {"right": ["holds"] * 99, "wrong": ["holds", "fails", *["holds"] * 99]}
    states |= {"raised": ["holds", "raises", *["not reached"] * 99]}
    state = states.get(outcome, ["not done"] * 99)
    facts = tuple(FactResult(fact.name, state[k]) for k, fact in enumerate(exercise.facts))
    if outcome == "wrong":
        facts = (facts[0], replace(facts[1], message=f"{facts[1].name}; {SECRET_VALUE}"), *facts[2:])
    if outcome == "raised":
        said = "TypeError: 0.12345 is no label\n  at line 3 of cfg:  eps = model(x, 0.5)"
        facts = (facts[0], replace(facts[1], message=said), *facts[2:])
    known = exercise.mistakes[mistake] if outcome == "wrong" and mistake is not None else None
    found = Verdict(
        exercise=exercise.id,
        names=exercise.names,
        outcome=outcome,
        points=float(exercise.points) if outcome == "right" else 0.0,
        out_of=float(exercise.points),
        reason="" if outcome == "right" else f"{outcome}: {facts[1].name}",
        facts=facts if outcome in ("right", "wrong", "raised", "not done") else (),
        formulas=("out = eps_u + (s + 1)·(eps_c − eps_u)",) if known and exercise.id == "04.1" else (),
        mistake=known.name if known else None,
        diagnosis=known.diagnosis if known else None,
        relation="it is 1.500 times the right result" if outcome == "wrong" and not known else None,
        seconds=0.03,
        calls=17,
    )
    return replace(found, **changes)


def submission(student, outcomes, *, late=0.0, overrides=(), **changes):
    """A scored submission of lesson 04: one outcome per exercise, or (outcome, mistake), in order."""
    asked = [(one, None) if isinstance(one, str) else one for one in outcomes]
    found = [
        verdict(exercise, outcome, mistake=mistake)
        for exercise, (outcome, mistake) in zip(lesson("04"), asked, strict=False)
    ]
    defaults = dict(
        submission=f"{student.lower().replace(' ', '-')}-04",
        student=student,
        lesson="04",
        file=f"{student.lower().replace(' ', '_')}/04_classifier_free_guidance.ipynb",
        sha256=sha256(student.encode()).hexdigest(),
        status="graded",
        cells=tuple(CellRun(2 * k + 1, f"c{k}", "ran") for k in range(14)),
        level="L2",
        layers=LAYERS,
        versions=(("course", "0.1.0"), ("exercises", "5f1c9a02"), ("python", "3.11.2"), ("torch", "2.13.0")),
        key="autumn",
        seconds=0.61,
        graded_at="2026-11-20 18:03 UTC",
    )
    graded = Graded(**defaults | changes | {"verdicts": tuple(found)})
    given = dict(overrides)
    scored = tuple(
        ScoredVerdict(
            one, given.get(one.exercise, (one.points, ""))[0], one.out_of, given.get(one.exercise, (0, ""))[1]
        )
        for one in found
    )
    counted = [one for one in scored if one.verdict.outcome != "grader error" or one.override]
    earned = sum(one.points for one in counted)
    off = round(late * earned, 6)
    note = f"late, day 2: {late:.0%} off" if late else ""
    return Scored(graded, scored, off, note, round(earned - off, 6), sum(one.out_of for one in counted))


R, W = "right", "wrong"


def invented_class():
    """Twelve submissions: strong, weak, late, overridden, twins, a hang, a crash, an unreadable file, our own error."""
    hang = CellRun(9, "c4", "timeout", "needs more than 10 seconds")
    raising = CellRun(11, "c5", "raised", "NameError: name 'np' is not defined\n  at line 1:  np.zeros(3)")
    return [
        submission("Ada Okafor", [R] * 10),
        submission("Björn Sandström", [R, R, (W, 1), R, R, R, R, (W, 0), R, R]),
        submission("Chiara Ricci", [(W, 1), R, R, (W, 1), R, R, "raised", (W, 0), R, "not done"], late=0.2),
        submission("Dmitri Volkov", [R, R, R, R, R, R, R, (W, 0), R, R], identical_to=("emeka-n-04",)),
        submission("Emeka N", [R, R, R, R, R, R, R, (W, 0), R, R], identical_to=("dmitri-volkov-04",)),
        submission(
            "Fatima Zahra",
            [R, (W, 0), R, R, (W, None), R, R, R, R, R],
            overrides=[("04.5", (1.0, "A fair reading of the question."))],
        ),
        submission(
            "Grace Lindqvist",
            [(W, 1), "missing", "missing", *["not done"] * 7],
            notes=("the check cell of 04.2 was edited",),
        ),
        submission(
            "Hugo Martín",
            [R, R, "timeout", R, R, (W, 1), R, "died", R, R],
            cells=(CellRun(1, "c0", "ran"), hang, raising),
            output="loading\nstep 1\nstep 2\n",
        ),
        submission(
            "Ines Duarte",
            [],
            status="unreadable",
            cells=(),
            level="",
            layers=(),
            key="",
            notes=(
                "this is an HTML page, not a notebook: download the file itself from the course page, hand it in again",
            ),
        ),
        submission("Jun Watanabe", [R, R, R, R, R, R, R, R, R, "grader error"]),
        submission("Kwame Mensah", [R, R, R, (W, 1), R, R, R, R, (W, 2), R]),
        submission("Leila Haddad", [(W, 1), R, R, (W, 0), R, "forbidden", R, R, R, R]),
    ]


def evil():
    """A submission of hostile strings wherever a string can be."""
    one = submission(
        "x",
        [(W, 0), "raised"],
        submission="=" + "a" * 300,
        file="../" + EVIL,
        output=EVIL * 3,
        notes=(EVIL,),
        identical_to=(EVIL,),
        cells=(CellRun(1, EVIL, "raised", EVIL),),
    )
    one = replace(one, graded=replace(one.graded, student=EVIL))
    hostile = tuple(
        replace(
            item,
            override=EVIL,
            verdict=replace(
                item.verdict,
                reason=EVIL,
                mistake=EVIL,
                diagnosis=EVIL,
                relation=EVIL,
                formulas=(EVIL,),
                notes=(EVIL,),
                facts=tuple(replace(fact, message=fact.message + EVIL) for fact in item.verdict.facts),
            ),
        )
        for item in one.verdicts
    )
    return replace(one, verdicts=hostile, late_note=EVIL)


@pytest.fixture(scope="module")
def scored():
    return invented_class()


def everything(scored, folder):
    """All files that the reports write for these submissions, as {path: text}."""
    write_pages(scored, folder, ["a problem <b>of the batch</b>"])
    write_tables(scored, folder)
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


class Page(HTMLParser):
    """The tags and the text of a page; raises where tags are not closed in order."""

    VOID = ("meta", "br")

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("dirty", "due"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Ja", "a"),
        ("\x1b]never ended", "never ended"),
        ("\u202eabc\u2066d\u200f", "abcd"),
        ("a\x00b\x7fc\x85d\r\ne\u2028f", "abc\nd\ne\nf"),
        ("\ud800", "\ufffd"),
        ("שלום می‌شود 👩‍🔬 é", "שלום می‌شود 👩‍🔬 é"),
        ("tab\tstays", "tab\tstays"),
    ],
)
def test_clean_keeps_letters_and_drops_what_acts(dirty, due):
    assert clean(dirty) == due


def test_one_line_and_numbers():
    assert one_line(" a\n\x1b[1mb \t c") == "a b c"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"
    assert [number(x) for x in (7.0, 6.4, 1 / 3, 0.001, -0.5, 100, 1e-12)] == [
        "7",
        "6.4",
        "0.33",
        "0",
        "-0.5",
        "100",
        "0",
    ]
    assert sorted(["04.10", "04.2", "03.9"], key=words.order) == ["03.9", "04.2", "04.10"]


def test_every_outcome_has_its_words():
    for outcome in OUTCOMES:
        item = feedback(ScoredVerdict(Verdict("04.1", ("cfg",), outcome, 0.0, 1.0), 0.0, 1.0))
        assert item.word and item.mark and item.sentence
        assert "{" not in item.sentence


SOURCE = "def cfg(model, x):\n    eps = model(x, 0.5)\n    return eps\n"


@pytest.mark.parametrize(
    ("message", "source", "due"),
    [
        (
            "TypeError: 0.73\n  at line 2 of cfg:  eps = model(x, 0.5)",
            SOURCE,
            "TypeError at line 2 of cfg: eps = model(x, 0.5)",
        ),
        ("TypeError: 0.73\n  at line 2 of cfg:  eps = model(x, 0.5)", "", "TypeError at line 2 of cfg."),
        ("TypeError: 0.73\n  at line 2 of cfg:  0.73, 0.91", SOURCE, "TypeError at line 2 of cfg."),
        ("TypeError: 0.73\n  at line 2 of leak_073:  x", SOURCE, "TypeError at line 2."),
        ("Leak073: 0.73\n  at line 2 of cfg:  x", SOURCE, "an exception at line 2 of cfg."),
        ("torch.OutOfMemoryError: 0.73", SOURCE, "torch.OutOfMemoryError."),
        ("0.73 0.91", SOURCE, "an exception."),
        ("", SOURCE, "an exception."),
        ("ValueError: 0.73\n  at line 999999999999 of cfg:  x", SOURCE, "ValueError."),
    ],
)
def test_of_an_exception_only_type_and_own_line_reach_a_student(message, source, due):
    assert stopped(message, ("cfg",), source) == f"Your code stopped with {due}"


# ---------------------------------------------------------------- pages


def test_a_page_for_everybody_in_two_versions(scored, tmp_path):
    files = everything(scored, tmp_path)
    assert sum(name.startswith("students/") for name in files) == len(scored) == 12
    assert {n.removeprefix("students/") for n in files if n.startswith("students/")} == {
        n.removeprefix("instructor/") for n in files if n.startswith("instructor/")
    }
    for name, text in files.items():
        if name.endswith(".html"):
            page = Page(text)
            assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
            assert all("scope" in attrs for attrs in page.all("th"))
            for drawing in page.all("svg"):
                assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and drawing["aria-labelledby"])


def test_a_student_reads_property_formula_and_diagnosis_and_no_values(scored, tmp_path):
    one = next(one for one in scored if one.graded.student == "Chiara Ricci")
    files = everything(scored, tmp_path)
    text = Page(files["students/chiara-ricci-04.html"]).text
    wrong = one.verdicts[0].verdict
    assert wrong.facts[1].name in text and wrong.formulas[0] in text and wrong.diagnosis in text
    assert "5.6 of 15 points" in text and "5 of 10 exercises are right" in text and "20% off" in text
    assert 'check("04.1", cfg, hint=2)' in text
    assert "Your code stopped with TypeError at line 3" in text


def test_what_a_student_does_not_receive(tmp_path):
    one = submission(
        "Kim", [("wrong", None), "raised"], output="OUTPUT", notes=("NOTE",), key="KEY", identical_to=("TWIN",)
    )
    facts = one.verdicts[0].verdict
    one = replace(
        one,
        verdicts=(replace(one.verdicts[0], verdict=replace(facts, reason="REASON", notes=("VNOTE",))), one.verdicts[1]),
    )
    files = everything([one], tmp_path)
    student, instructor = files["students/kim-04.html"], files["instructor/kim-04.html"]
    for word in (SECRET_VALUE, "0.12345", "OUTPUT", "NOTE", "KEY", "TWIN", "REASON", "VNOTE", "1.500 times", "autumn"):
        assert word not in student
        assert word == "autumn" or word in instructor
    assert not any(fact.message for item in one.verdicts for fact in feedback(item).facts)
    shown = json.dumps(results_json(one)["tests"]) + results_json(one)["output"]
    for word in (SECRET_VALUE, "0.12345", "OUTPUT", "NOTE", "TWIN", "REASON", "1.500 times"):
        assert word not in shown


def test_an_unreadable_file_tells_what_to_do_and_our_error_is_not_final(scored, tmp_path):
    files = everything(scored, tmp_path)
    assert "download the file itself" in Page(files["students/ines-duarte-04.html"]).text
    ours = Page(files["students/jun-watanabe-04.html"]).text
    assert "Something went wrong on our side" in ours and "not counted yet" in ours and "0 of 2" not in ours


def test_why_a_file_could_not_be_read_is_told_everywhere(tmp_path):
    why = "it is a web page: hand in the notebook itself"
    verdicts = tuple(verdict(one, "unreadable", reason=why) for one in lesson("04")[:2])
    one = submission("Ines", [], status="unreadable", cells=(), level="", layers=(), notes=("twice as large",))
    items = tuple(ScoredVerdict(item, 0.0, item.out_of) for item in verdicts)
    one = replace(one, graded=replace(one.graded, verdicts=verdicts), verdicts=items)
    files = everything([one], tmp_path)
    for name in ("students/ines-04.html", "index.html"):
        assert why in Page(files[name]).text.replace("It is a web", "it is a web"), name
    assert "twice as large" not in files["students/ines-04.html"]
    assert why in results_json(one)["output"]


def test_pages_that_are_not_due_any_more_are_removed_and_nothing_else(scored, tmp_path):
    write_pages(scored[:3], tmp_path)
    (tmp_path / "students" / "mine.html").write_text("not theirs")
    with (tmp_path / "pages.txt").open("a") as file:
        file.write("../outside.html\nindex.html\n")
    (tmp_path.parent / "outside.html").write_text("not theirs")
    write_pages(scored[:1], tmp_path)
    assert {path.name for path in (tmp_path / "students").iterdir()} == {"ada-okafor-04.html", "mine.html"}
    assert {path.name for path in (tmp_path / "instructor").iterdir()} == {"ada-okafor-04.html"}
    assert (tmp_path.parent / "outside.html").exists() and (tmp_path / "index.html").exists()


def test_the_class_at_a_glance(scored, tmp_path):
    page = Page(everything(scored, tmp_path)["index.html"])
    assert "Lesson 04: 12 submissions" in page.text
    assert "isolation level L2 (user namespace, no network" in page.text
    assert "a problem <b>of the batch</b>" in page.text
    for found in (
        "the same bytes as emeka-n-04",
        "the process ended in 04.8",
        "out of time in cell 9",
        "our error in 04.10",
    ):
        assert found in page.text
    description = next(text for text in re.findall(r"<desc[^>]*>([^<]*)", (tmp_path / "index.html").read_text()))
    assert sum(map(int, re.findall(r"percent: (\d+)", description))) == 11  # one of the twelve has nothing to reach
    heights = [float(bar["height"]) for bar in page.all("rect") if bar.get("class") == "bar" and "rx" in bar]
    assert len(heights) == 10 and max(heights) <= 160


def test_isolation_is_told_as_it_was():
    one, other, none = (submission(name, ["right"]).graded for name in "abc")
    other = replace(other, level="P0", layers=())
    both = isolation_sentences([one, other, replace(none, level="", layers=())])
    assert "The code of 1 of 3 submissions was run at isolation level L2" in "".join(both)
    assert any("P0" in line and "read files" in line for line in both)
    assert both[-1] == "1 submission was not run at all."


def test_hostile_strings_stay_text(tmp_path):
    files = everything([evil()], tmp_path)
    assert len(files) == 7
    for name, text in files.items():
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), name
        assert len(name.split("/")[-1]) < 120
        if name.endswith(".html"):
            page = Page(text)
            assert "<script>alert(1)</script></title>" in page.text
            assert len(page.all("title")) == 1 and text.count("</title>") == 1
            assert len(page.all("script")) == (name == "index.html")
            assert not any(key.startswith("on") or key in ("style", "src") for _, attrs in page.tags for key in attrs)
            links = [attrs["href"] for attrs in page.all("a")]
            assert all(re.fullmatch(r"(\.\./)?(students/|instructor/)?[\w.-]+\.html", link) for link in links)
    assert "<" not in "".join(path.name for path in tmp_path.rglob("*"))


def test_the_policy_lets_nothing_in_but_our_own_style_and_script(scored, tmp_path):
    for name, text in everything(scored, tmp_path).items():
        if not name.endswith(".html"):
            continue
        policy = next(attrs["content"] for attrs in Page(text).all("meta") if attrs.get("http-equiv"))
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'" and "unsafe" not in policy and "http" not in policy
        for tag in ("style", "script"):
            bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
            hashes = {f"'sha256-{b64encode(sha256(body.encode()).digest()).decode()}'" for body in bodies}
            assert hashes == ({rules[f"{tag}-src"]} if f"{tag}-src" in rules else set())


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_the_contrast_of_WCAG_AA_in_light_and_in_dark(scored, tmp_path):
    html = everything(scored[:1], tmp_path)["index.html"]
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S)[:2]
    ]
    assert all(
        {"ground", "card", "code", "text", "soft", "link", "good", "bad", "wait", "ours"} <= set(s) for s in schemes
    )
    for colours in schemes:
        for ink in ("text", "soft", "link", "good", "bad", "wait", "ours"):
            for paper in ("ground", "card", "code"):
                dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_the_same_input_gives_the_same_bytes_whatever_the_order(scored, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert everything(scored, one) == everything(list(reversed(scored)), other)
    assert everything(scored, one) == everything(scored, one)
    assert not list(tmp_path.rglob("*.part"))


def test_page_names_are_safe_and_distinct():
    ids = [
        "kim-04",
        "Kim-04",
        "../x",
        "a" * 300,
        "a" * 301,
        "con",
        "nul.04",
        "-x",
        ".x",
        "x.",
        "ü",
        "\ud800",
        "",
        "a/b",
        "a\nb",
    ]
    names = page_names(ids)
    assert len({name.lower() for name in names.values()}) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.html", name) and len(name) < 110 for name in names.values())
    assert page_names(["kim-04"]) == {"kim-04": "kim-04.html"}
    with pytest.raises(ValueError, match="two submissions have the id 'a'"):
        page_names(["a", "b", "a"])


def test_no_submissions_at_all(tmp_path):
    page = Page(everything([], tmp_path)["index.html"])
    assert "0 submissions" in page.text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_runs_our_script_and_no_other(scored, tmp_path):
    everything([*scored, evil()], tmp_path)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --no-first-run"
    )
    call = [
        "chromium",
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run([*call, f"file://{tmp_path / 'index.html'}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("sort by this column") > 10  # the script put its buttons in
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr


# ---------------------------------------------------------------- tables


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_csv_totals(scored, tmp_path):
    write_tables(scored, tmp_path)
    scores, verdicts = rows(tmp_path / "scores.csv"), rows(tmp_path / "verdicts.csv")
    assert len(scores) == 12 and len(verdicts) == 110
    for row, one in zip(scores, sorted(scored, key=lambda one: one.graded.student), strict=True):
        assert float(row["points"]) == pytest.approx(one.points) and row["student"] == one.graded.student
        cells = [row[f"{e.id} points"] for e in lesson("04") if row[f"{e.id} points"]]
        assert sum(map(float, cells)) == pytest.approx(one.points + one.late)
        mine = [float(line["points"]) for line in verdicts if line["id"] == one.graded.submission]
        assert sum(mine) == pytest.approx(one.points + one.late)
    assert list(scores[0])[10:14] == ["04.1 points", "04.1 outcome", "04.2 points", "04.2 outcome"]


def test_csv_mistakes_count_everybody(scored, tmp_path):
    write_tables(scored, tmp_path)
    found = rows(tmp_path / "mistakes.csv")
    for exercise in lesson("04"):
        mine = [row for row in found if row["exercise"] == exercise.id]
        assert int(mine[0]["right"]) + sum(int(row["count"]) for row in mine) == int(mine[0]["submissions"]) == 11
        counts = [int(row["count"]) for row in mine]
        assert counts == sorted(counts, reverse=True)
    assert mistakes(item for one in scored for item in one.verdicts if item.verdict.exercise == "04.8")[0] == (
        ("mistake", "projected onto x_u"),
        4,
    )


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "\x00=", "＝"])
def test_no_cell_is_a_formula(start):
    (cell,), (amount, *_) = csv.reader(io.StringIO(to_csv([[f"{start}1+1"], [-0.5, 3, None]])))
    assert cell.startswith("'") and amount == "-0.5"


def test_hostile_strings_in_csv_and_on_the_terminal(tmp_path):
    write_tables([evil()], tmp_path)
    row = rows(tmp_path / "scores.csv")[0]
    assert row["id"].startswith("'=") and "\n" not in row["student"]
    out = io.StringIO()
    marked = submission("[bold red]x[/bold red] [link=http://x]", ["right"])
    Console(file=out, width=200, force_terminal=True, no_color=True).print(table([evil(), marked]))
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # rich's own bold
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "[bold red]x[/bold red]" in text and "✓" in text


# ---------------------------------------------------------------- Gradescope

VISIBLE = {"enum": ["hidden", "after_due_date", "after_published", "visible"]}
FORMAT = {"enum": ["text", "simple_format", "html", "md", "ansi"]}
TEST = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "score": {"type": "number"},
        "max_score": {"type": "number"},
        "status": {"enum": ["passed", "failed"]},
        "name": {"type": "string"},
        "name_format": FORMAT,
        "number": {"type": "string"},
        "output": {"type": "string"},
        "output_format": FORMAT,
        "tags": {"type": "array", "items": {"type": "string"}},
        "visibility": VISIBLE,
        "extra_data": {"type": "object"},
    },
}
SCHEMA = {  # from Gradescope's documentation, "Autograder Specifications", section "Output format"
    "type": "object",
    "additionalProperties": False,
    "required": ["score"],
    "properties": {
        "score": {"type": "number"},
        "execution_time": {"type": "number", "minimum": 0},
        "output": {"type": "string"},
        "output_format": FORMAT,
        "test_output_format": FORMAT,
        "test_name_format": FORMAT,
        "visibility": VISIBLE,
        "stdout_visibility": VISIBLE,
        "extra_data": {"type": "object"},
        "tests": {"type": "array", "items": TEST},
        "leaderboard": {"type": "array"},
    },
}


def test_results_json_is_what_gradescope_documents(scored):
    for one in [*scored, evil()]:
        result = json.loads(json.dumps(results_json(one), allow_nan=False))
        jsonschema.validate(result, SCHEMA)
        assert result["score"] == one.points
        assert sum(test.get("score", 0) for test in result["tests"]) == pytest.approx(one.points + one.late)
        assert result["stdout_visibility"] == "hidden" and result["output_format"] == "text"
        assert all(test["output_format"] == test["name_format"] == "text" for test in result["tests"])
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result["output"] + str(result["tests"]))
    jun = results_json(next(one for one in scored if one.graded.student == "Jun Watanabe"))
    assert "score" not in jun["tests"][-1] and "not final" in jun["tests"][-1]["output"]
    jsonschema.validate(no_result("nothing"), SCHEMA)
    with pytest.raises(ValueError, match="visibility is one of"):
        results_json(scored[0], visibility="always")


def test_results_are_written_for_one_submission_only(scored, tmp_path):
    path = tmp_path / "results" / "results.json"
    for given, due in (([], "No notebook was found"), (scored[:2], "There are 2 notebooks"), (scored[:1], "10 of 10")):
        write_results(given, path)
        result = json.loads(path.read_text())
        jsonschema.validate(result, SCHEMA)
        assert due in result["output"]
    assert result["score"] == 15


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def autograder(tmp_path_factory):
    """An autograder folder made from this repository, laid out as Gradescope does."""
    root = tmp_path_factory.mktemp("autograder")
    rubric = root / "rubric.yaml"
    rubric.write_text("lesson: 04\n")
    archive = write_autograder(root / "source", ROOT, "04", secret=b"not known to anybody", rubric=rubric)
    (root / "submission").mkdir()
    return root, archive


def test_the_autograder_zip(autograder, tmp_path):
    root, archive = autograder
    with zipfile.ZipFile(archive) as zipped:
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in zipped.infolist()}
        assert {"setup.sh", "run_autograder", "secret", "rubric.yaml", "README.md"} <= set(modes)
        assert modes["run_autograder"] == modes["setup.sh"] == 0o755 and modes["secret"] == 0o600
        assert "condiff/pyproject.toml" in modes and "condiff/condiff_check/grading/report_html.py" in modes
        assert not [name for name in modes if "__pycache__" in name or "/tests/" in name or "solutions" in name]
        assert zipped.read("secret") == b"not known to anybody"
    again = write_autograder(
        tmp_path / "source", ROOT, "04", secret=b"not known to anybody", rubric=root / "rubric.yaml"
    )
    assert again.read_bytes() == archive.read_bytes()


def test_the_scripts_are_sound_and_name_no_host(autograder):
    root, _ = autograder
    for name in ("setup.sh", "run_autograder"):
        path = root / "source" / name
        subprocess.run(["bash", "-n", path], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", path], check=True)
        assert not re.search(r"@[A-Z]+@|https?://|pypi", path.read_text())


def run_autograder(root, program, **environment):
    """run_autograder in a scratch root with a program in the place of condiff-grade."""
    grade = root / "grade"
    grade.write_text(f"#!{sys.executable}\n{program}")
    grade.chmod(0o755)
    results = root / "results" / "results.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text('{"score": 100}')  # what an earlier run, or a submission, may have left
    environment = os.environ | {"AUTOGRADER_ROOT": str(root), "CONDIFF_GRADE": str(grade)} | environment
    done = subprocess.run(
        [root / "source" / "run_autograder"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    result = json.loads(results.read_text())
    jsonschema.validate(result, SCHEMA)
    return result, done


def test_run_autograder_hands_over_what_the_grader_wrote(autograder):
    root, _ = autograder
    program = """
import json, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
open(options["--gradescope"], "w").write(json.dumps({"score": 7, "extra_data": {"argv": sys.argv[1:]}}))
sys.exit(3)
"""
    result, _ = run_autograder(root, program)
    argv = result["extra_data"]["argv"]
    assert result["score"] == 7 and argv[0] == str(root / "submission")
    assert argv[argv.index("--lesson") + 1] == "04" and argv[argv.index("--secret") + 1] == str(
        root / "source" / "secret"
    )
    assert argv[argv.index("--require") + 1] == "L1" and str(root / "source" / "rubric.yaml") in argv


@pytest.mark.parametrize(
    ("program", "seconds", "due"),
    [
        ("raise SystemExit(5)", "60", "it ended with status 5"),
        ("import os; os.abort()", "60", "it ended with status"),
        ("import time; time.sleep(60)", "1", "out of time"),
        (
            'import sys; open(sys.argv[sys.argv.index("--gradescope") + 1], "w").write("{")',
            "60",
            "it ended with status 0",
        ),
    ],
)
def test_run_autograder_says_so_when_the_grader_fails(autograder, program, seconds, due):
    result, _ = run_autograder(autograder[0], program, CONDIFF_SECONDS=seconds)
    assert due in result["output"] and "no fault of your code" in result["output"]
    assert result["score"] == 0 and result["output"].startswith("NOT GRADED")  # Gradescope wants a score
    assert result["tests"][0]["status"] == "failed" and "Rerun Autograder" in result["tests"][0]["output"]


@pytest.mark.parametrize("key", ["submitted", "deadline", "late", "overrides"])
def test_a_rubric_with_what_is_gradescopes_own_is_refused(tmp_path, key):
    text = "lesson: 04\ndeadline: 2031-05-02T23:59Z\n" if key in ("deadline", "late") else "lesson: 04\n"
    text += {
        "submitted": "submitted: times.csv\n",
        "late": "late: {per_day: 10%}\n",
        "overrides": "overrides: [{student: kim, exercise: 04.1, points: 1, comment: x}]\n",
    }.get(key, "")
    (tmp_path / "times.csv").write_text("student,time\nkim,2031-05-02T20:10Z\n")
    (tmp_path / "rubric.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not for Gradescope"):
        write_autograder(tmp_path / "a", ROOT, "04", secret=b"", rubric=tmp_path / "rubric.yaml")
    assert not (tmp_path / "a").exists()


def test_a_rubric_for_another_lesson_is_refused(tmp_path):
    (tmp_path / "rubric.yaml").write_text("lesson: 01\n")
    with pytest.raises(ValueError, match="it is for lesson 01, and the autograder for 04"):
        write_autograder(tmp_path / "a", ROOT, "04", secret=b"", rubric=tmp_path / "rubric.yaml")


def test_run_autograder_without_a_grader(autograder):
    result, done = run_autograder(autograder[0], "", CONDIFF_GRADE=str(autograder[0] / "nothing"))
    assert "it is not installed" in result["output"] and "setup.sh" in done.stderr


def test_write_autograder_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(ValueError, match="two digits"):
        write_autograder(tmp_path / "a", ROOT, "4; rm -rf /", secret=b"")
    with pytest.raises(ValueError, match="neither a wheel"):
        write_autograder(tmp_path / "a", "--index-url=x", "04", secret=b"")
    with pytest.raises(ValueError, match="not the folder of the repository"):
        write_autograder(tmp_path / "b", tmp_path, "04", secret=b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="holds something"):
        write_autograder(tmp_path / "mine", ROOT, "04", secret=b"")
    assert (tmp_path / "mine" / "file").exists()


# ---------------------------------------------------------------- nbgrader


def nbgrader_export(folder, db):
    """What `nbgrader export` itself writes from the gradebook."""
    call = [sys.executable, "-m", "nbgrader", "export", "--db", db, "--to", str(folder / "grades.csv")]
    subprocess.run(call, cwd=folder, check=True, capture_output=True, timeout=120)
    return rows(folder / "grades.csv")


@pytest.fixture(scope="module")
def empty_gradebook(tmp_path_factory):
    """A gradebook that nbgrader made, which takes it some seconds."""
    pytest.importorskip("nbgrader")
    path = tmp_path_factory.mktemp("nbgrader") / "gradebook.db"
    write_gradebook([], f"sqlite:///{path}")
    return path


@pytest.fixture
def db(empty_gradebook, tmp_path):
    """The address of a gradebook of one's own."""
    return f"sqlite:///{shutil.copy(empty_gradebook, tmp_path)}"


@pytest.mark.slow
def test_scores_come_out_of_nbgrader_as_they_went_in(scored, db, tmp_path):
    forger = submission('x,,,,10,0,10,10\n"y', [R])  # nbgrader's exporter does not quote
    everybody = [*scored, forger]
    assert write_gradebook(everybody, db) == 13
    write_gradebook(everybody, db)  # again changes nothing
    write_csv(everybody, tmp_path / "ours.csv")
    theirs = {row["student_id"]: row for row in nbgrader_export(tmp_path, db)}
    ours = {row["student_id"]: row for row in rows(tmp_path / "ours.csv")}
    assert set(theirs) == set(ours) == {one.graded.student for one in scored} | {"x____10_0_10_10 _y"}
    assert list(next(iter(theirs.values()))) == list(next(iter(ours.values())))
    for one in everybody:
        student = "x____10_0_10_10 _y" if one is forger else one.graded.student
        exported, written = theirs[student], ours[student]
        assert float(exported["score"]) == pytest.approx(one.points) == pytest.approx(float(written["score"]))
        for column in ("raw_score", "late_submission_penalty"):
            assert float(exported[column]) == pytest.approx(float(written[column]))
        assert float(exported["max_score"]) == 15 and exported["assignment"] == written["assignment"] == "lesson04"


def test_overrides_errors_and_manual_scores_in_the_gradebook(scored, db):
    api = pytest.importorskip("nbgrader.api")
    write_gradebook(scored, db, extra=["04.10"])

    def grade(book, exercise, student):
        return book.find_grade(f"{exercise.replace('.', '-')}-check", "lesson04", "lesson04", student)

    with api.Gradebook(db) as book:
        override = grade(book, "04.5", "Fatima Zahra")
        assert (override.auto_score, override.manual_score, override.score) == (0, 1, 1)
        assert book.find_comment("04-5-answer", "lesson04", "lesson04", "Fatima Zahra").comment.startswith("A fair")
        assert "Probably: " in book.find_comment("04-1-answer", "lesson04", "lesson04", "Leila Haddad").comment
        error = grade(book, "04.10", "Jun Watanabe")
        assert error.needs_manual_grade and error.auto_score is None
        assert book.find_assignment("lesson04").max_score == 13
        error.manual_score = 1.5  # somebody looks, and decides
        book.db.commit()
    write_gradebook(scored, db)
    with api.Gradebook(db) as book:
        assert grade(book, "04.10", "Jun Watanabe").score == 1.5
        assert not grade(book, "04.10", "Jun Watanabe").needs_manual_grade


@pytest.mark.filterwarnings("ignore:Object of type")  # nbgrader's own code warns of itself
@pytest.mark.slow
def test_a_gradebook_that_nbgrader_made_keeps_its_notebook(scored, db):
    api = pytest.importorskip("nbgrader.api")
    with api.Gradebook(db) as book:
        book.add_assignment("guidance")
        book.add_notebook("04_classifier_free_guidance", "guidance")
        book.add_grade_cell("04-1-check", "04_classifier_free_guidance", "guidance", max_score=1, cell_type="code")
        book.add_student("Ada Okafor", first_name="Ada")
        book.add_submission("guidance", "Ada Okafor")  # before there were cells for the other exercises
    write_gradebook(scored[:2], db, assignment="guidance")
    with api.Gradebook(db) as book:
        assert [one.name for one in book.find_assignment("guidance").notebooks] == ["04_classifier_free_guidance"]
        assert book.find_submission("guidance", "Ada Okafor").score == 15
        assert book.find_student("Ada Okafor").first_name == "Ada"

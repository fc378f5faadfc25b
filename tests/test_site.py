"""Every page is there, in both editions; each is whole in a browser, offline, and none tells learners an answer."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from chromium import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
EDITIONS = ("learners", "instructors")
BUILT_WITH = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton", "sphinx-mathjax-offline")
every_edition = pytest.mark.parametrize("edition", EDITIONS)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@pytest.fixture(autouse=True)
def _modules_of_the_site(monkeypatch):
    monkeypatch.syspath_prepend(str(SITE))


def module(name):
    return importlib.import_module(name)


def needs_extra():
    missing = [name for name in BUILT_WITH if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the extra condiff[site] is not installed: {', '.join(missing)}")


def listed(text):
    """What the tables of contents of a page name."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip() and line[0] != ":"]


# --- the sources ------------------------------------------------------------------------------------------------------


@every_edition
def test_every_lesson_result_and_document_stands_in_a_table_of_contents(edition):
    book = module("book")
    pages = [book.for_edition(page.read_text(), edition) for page in SITE.glob("*.md")]
    entries = {entry for page in pages for entry in listed(page)}
    assert "api/index" in entries
    folder = book.EDITIONS[edition]
    names = {file.relative_to(ROOT) for file in book.files(edition) if file.suffix in (".md", ".ipynb")}
    shown = {Path("notebooks", *name.parts[1:]) if name.parts[0] == folder else name for name in names}
    shown = {name.with_suffix("").as_posix() for name in shown} - {"README"}  # the README is on the first page
    assert {name for name in shown if not {name, f"{Path(name).parent}/*"} & entries} == set()


@every_edition
def test_an_edition_has_all_lessons_benchmarks_and_documents(edition):
    found = {file.relative_to(ROOT).as_posix() for file in module("book").files(edition)}
    folder = {"learners": "notebooks", "instructors": "solutions"}[edition]
    due = {f"{folder}/{file.stem}.ipynb" for file in (ROOT / "lessons").glob("*.py")}
    due |= {
        file.relative_to(ROOT).as_posix() for where in ("docs", "benchmarks") for file in (ROOT / where).glob("*.md")
    }
    assert due - found == ({"docs/grading.md"} if edition == "learners" else set())


def test_the_learners_edition_takes_nothing_from_the_solutions():
    files = [file.relative_to(ROOT) for file in module("book").files("learners")]
    assert [file for file in files if file.parts[0] == "solutions" or file == Path("docs/grading.md")] == []


def test_the_reference_has_every_module_once():
    modules = [name for names in module("reference").MODULES.values() for name in names]
    assert sorted(modules) == sorted(file.stem for file in (ROOT / "condiff_ref").glob("[!_]*.py"))


def test_the_first_page_repeats_the_readme_and_has_no_numbers_of_its_own():
    page = (SITE / "index.md").read_text()
    assert re.findall(r"\d", page.replace("00_world", "")) == []
    spliced = module("book").spliced(page, (ROOT / "README.md").read_text())
    assert "<!-- README" not in spliced
    assert "| scale | class accuracy |" in spliced


def test_the_sources_name_no_machine_and_no_server():
    for file in [*SITE.glob("*.py"), *SITE.glob("*.md"), *SITE.glob("_static/*")]:
        text = file.read_text()
        assert re.findall(r"(?<![\w.$})])/(?:root|home|work|opt|mnt|tmp|Users)\b\S*", text) == [], file
        hosts = set(re.findall(r"https?://([^/\s\"'{)]+)", text))
        # the address of a button, our own, and the name of SVG
        assert hosts <= {"colab.research.google.com", "127.0.0.1:", "www.w3.org"}, file


def test_lines_for_one_edition_are_left_out_of_the_other():
    text = "a\n<!-- instructors -->\nb\n<!-- /instructors -->\n<!-- learners -->\nc\n<!-- /learners -->\nd\n"
    assert module("book").for_edition(text, "learners") == "a\nc\nd\n"
    assert module("book").for_edition(text, "instructors") == "a\nb\nd\n"


# --- links, words for pictures ----------------------------------------------------------------------------------------


class App:
    """As much of Sphinx as a link needs to know."""

    class Environment:
        found_docs = ("docs/errata", "notebooks/00_world", "index")

        def doc2path(self, name, base):
            return f"{name}.ipynb" if name.startswith("notebooks") else f"{name}.md"

    class Settings:
        root, repository = str(ROOT), "https://x.org/r"

    env, config = Environment(), Settings()

    def __init__(self, *tags):
        self.tags = type("Tags", (), {"has": lambda self, tag: tag in tags})()


@pytest.mark.parametrize(
    ("page", "link", "where"),
    [
        ("docs/coverage", "errata.md", "../docs/errata.md"),
        ("docs/errata", "../notebooks/00_world.ipynb", "../notebooks/00_world.ipynb"),
        ("index", "notebooks/00_world.ipynb#a-b", "notebooks/00_world.ipynb#a-b"),
        ("index", "LICENSE", "https://x.org/r/blob/main/LICENSE"),
        ("index", "solutions", "https://x.org/r/tree/main/solutions"),
        ("index", "solutions/00_world.ipynb", "https://x.org/r/blob/main/solutions/00_world.ipynb"),
        ("index", "no/such/file.md", "no/such/file.md"),
        ("index", "#place", "#place"),
        ("index", "https://other.org/a", "https://other.org/a"),
    ],
)
def test_a_link_leads_to_a_page_or_else_to_the_file_in_the_repository(page, link, where):
    pytest.importorskip("docutils", reason="the extra condiff[site] is not installed")
    content = [f"see [there]({link})"]
    module("rewrite").links(App(), page, content)
    assert content == [f"see [there]({where})"]


def test_for_instructors_a_link_to_a_solution_stays_on_the_site():
    pytest.importorskip("docutils", reason="the extra condiff[site] is not installed")
    content = ["[a](solutions/00_world.ipynb)"]
    module("rewrite").links(App("instructors"), "index", content)
    assert content == ["[a](notebooks/00_world.ipynb)"]


def test_badges_become_words_and_anchors_of_errata_become_targets():
    pytest.importorskip("docutils", reason="the extra condiff[site] is not installed")
    content = ['[![Open in Colab](https://h.org/b.svg)](https://h.org/n)\n<a id="e7"></a>\n[E7](errata.md#e7)']
    module("rewrite").links(App(), "docs/coverage", content)
    assert content == ["[Open in Colab](https://h.org/n)\n(e7)=\n[E7](#e7)"]


# --- the reference ----------------------------------------------------------------------------------------------------


def test_signs_of_a_formula_stand_for_themselves_and_code_stays_code():
    escaped = module("reference").escaped
    assert escaped("a*b_ and `c*d`") == r"a\*b\_ and ``c*d``"


def test_signatures_are_those_of_the_source_with_links_to_our_types():
    from condiff_ref.guidance import apg, interval
    from condiff_ref.schedules import Schedule

    signature = module("reference").signature
    denoiser = "condiff_ref.shapes.Denoiser"
    shown, returns = signature(None, "function", "", interval, None, None, None)
    assert shown == f"(inside: {denoiser}, outside: {denoiser}, low: float, high: float)"
    assert returns == denoiser
    assert "max_norm: float=math.inf" in signature(None, "function", "", apg, None, None, None)[0]
    shown, returns = signature(None, "method", "", Schedule.log_snr, None, None, None)
    assert (shown, returns) == ("(t: condiff_ref.shapes.Time)", "condiff_ref.shapes.PerExample")
    assert signature(None, "class", "", Schedule, None, None, None)[0].startswith("(alpha: condiff_ref.schedules.Curve")


def test_every_public_function_of_the_reference_is_on_its_page():
    reference = module("reference")
    page = reference.module_page("condiff_ref.guidance")
    from condiff_ref import guidance

    public = [n for n, f in vars(guidance).items() if inspect.isfunction(f) and f.__module__ == guidance.__name__]
    missing = [n for n in public if not n.startswith("_") and f".. autofunction:: {n}\n" not in page]
    assert missing == []
    assert ".. py:data:: Time\n   :value: Float[Tensor, ' b']\n" in reference.module_page("condiff_ref.shapes")


def test_the_page_of_commands_has_each_command_and_its_options():
    page = module("reference").commands_page()
    assert {"condiff demo", "condiff train", "condiff sample", "condiff evaluate"} <= set(page.splitlines())
    assert "``--scale``" in page
    assert "\ncondiff-grade\n" in page


# --- Sphinx, on a page or two -----------------------------------------------------------------------------------------


def sphinx(folder, page):
    (folder / "source").mkdir()
    (folder / "source/index.md").write_text(page)
    call = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "-c", SITE, folder / "source", folder / "html"]
    return subprocess.run(call, capture_output=True, text=True, timeout=250)


def test_a_page_is_built_with_its_formula_and_the_script_that_shows_it(tmp_path):
    needs_extra()
    done = sphinx(tmp_path, "# Title\n\nA formula, $a^2$.\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "html/_static/mathjax/tex-svg.js").stat().st_size > 1e6
    assert r"\(a^2\)" in (tmp_path / "html/index.html").read_text()


@pytest.mark.parametrize("broken", ["[a link](nowhere.md)", "![a picture](nowhere.png)", "[a place](#nowhere)"])
def test_a_link_or_picture_that_is_not_there_ends_the_build(tmp_path, broken):
    needs_extra()
    assert sphinx(tmp_path, f"# Title\n\n{broken}\n").returncode != 0


# --- in a browser -----------------------------------------------------------------------------------------------------

HEAD = '<!doctype html><title>t</title><meta name="viewport" content="width=device-width, initial-scale=1">'
FAULTY = f"""{HEAD}<article><h1>Faults</h1>
<img src="nowhere.png" alt="a picture"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">
<p>Let \\(x_0\\) be.</p><span class="math">\\(a\\)</span><div style="width:3000px">wide</div>
<script>console.error("oh"); undefinedFunction();</script><img src="http://other.org/a.png" alt="far away">
<a href="gone.html">dead</a><a href="#gone">dead</a></article>"""


@needs_browser
def test_the_browser_finds_every_fault_that_it_looks_for(tmp_path):
    (tmp_path / "faulty.html").write_text(FAULTY)
    (tmp_path / "fine.html").write_text(f'{HEAD}<h1>Fine</h1><a href="faulty.html">x</a>')
    (tmp_path / "favicon.ico").write_bytes(b"")
    browser = module("browser")
    with browser.Served(tmp_path) as site:
        assert site.faults("fine.html") == []
        told = "\n".join(site.faults("faulty.html"))
    for fault in (
        "broken image",
        "without alt text",
        "raw formula: Let",
        "formula not rendered",
        "wider than the window",
    ):
        assert fault in told
    for fault in ("console error: oh", "script error", "asks another server: http://other.org", "on a telephone"):
        assert fault in told
    dead = ["faulty.html: no file gone.html", "faulty.html: no file nowhere.png", "faulty.html: no place #gone"]
    assert sorted(browser.dead_links(tmp_path)) == dead


class Words(HTMLParser):
    """All that a page says."""

    def __init__(self, text):
        super().__init__()
        self.pieces = []
        self.feed(text)

    def handle_data(self, data):
        self.pieces.append(data)


def said(file):
    """The words of a page, of a notebook to download, or of the search index, without blanks."""
    text = file.read_text()
    if file.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
    elif file.suffix == ".html":
        text = "".join(Words(text).pieces)
    return "".join(text.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both editions, built once."""
    needs_extra()
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, SITE / "book.py", "-o", folder], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_browser
@every_edition
def test_every_page_is_whole_offline(built, edition):
    browser, folder = module("browser"), built / edition
    pages = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.html"))
    assert {"index.html", "docs/errata.html", "api/condiff_ref.guidance.html", "notebooks/00_world.html"} <= set(pages)
    with browser.Served(folder) as site:
        faults = {page: found for page in pages if (found := site.faults(page))}
        site.page.goto(site.home + "search.html?q=guidance")
        site.page.wait_for_function("document.querySelectorAll('#search-results li').length > 3")
    assert faults == {}
    assert browser.dead_links(folder) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_learners_are_told_no_answer_and_instructors_are(built):
    from condiff_check.registry import find
    from lesson import build

    texts = {}
    for edition in EDITIONS:
        files = [
            file for file in (built / edition).rglob("*") if file.suffix in (".html", ".ipynb", ".txt", ".md", ".rst")
        ]
        texts[edition] = "".join(map(said, [*files, built / edition / "searchindex.js"]))
    lessons = {f.stem: build(f.read_text(), f.stem, find, None) for f in sorted((ROOT / "lessons").glob("*.py"))}
    for stem, lesson in lessons.items():
        others = "".join(cell.source for name, other in lessons.items() if name != stem for cell in other.student.cells)
        known = "".join((lesson.visible + others).split())  # `with torch.no_grad():` stands in many a lesson
        lines = ["".join(line.split()) for line in lesson.hidden if not line.lstrip().startswith(("import ", "from "))]
        secret = {line for line in lines if len(line) >= 20 and line not in known}
        assert len(secret) > 20
        assert {line for line in secret if line in texts["learners"]} == set(), stem
        assert {line for line in secret if line not in texts["instructors"]} == set(), stem

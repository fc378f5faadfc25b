"""README and CONTRIBUTING say what is true: the program runs, files and targets exist, commands parse, counts hold."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from condiff_check.registry import exercises
from condiff_ref import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def test_the_program_in_the_readme_keeps_the_crowded_island(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(program, {})
    mass = float(re.search(r"tensor\(([\d.]+)", capsys.readouterr().out)[1])
    # a second program, with 120 steps, keeps .460 of the mass there under this rule; five standard errors at n = 2,000
    # are .056
    assert abs(mass - 0.46) < 0.056


def test_the_pages_link_to_files():
    assert len(LINK.findall(README)) > 30
    assert LINK.findall("see [a](docs/a.md#part), [b](b.md)") == ["docs/a.md", "b.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_local_file_that_a_page_links_to_exists(page):
    links = [link for link in LINK.findall((ROOT / page).read_text()) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_that_a_page_names_exists(page):
    targets = re.search(r"^\.PHONY: (.*) FORCE$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    code = re.findall(r"`([^`\n]+)`|^(?: {4})?(make .*)$", (ROOT / page).read_text(), flags=re.M)
    named = {words.split()[1] for words in map("".join, code) if re.match(r"make [a-z]", words)}
    assert named
    assert named - set(targets) == set()


def test_the_table_of_lessons_has_each_lesson_under_its_title():
    rows = re.findall(r"^\| \[(.+?)\]\(notebooks/(.+?)\.ipynb\) \|", README, flags=re.M)
    sources = {file.stem: file.read_text() for file in sorted((ROOT / "lessons").glob("*.py"))}
    titles = {name: re.search(r"^# # (?:\d\d\W+)?(.+)$", text, flags=re.M)[1] for name, text in sources.items()}
    assert {name: title.partition(" ")[2] for title, name in rows} == titles
    assert [title[:2] for title, _ in rows] == [name[:2] for name in titles]


def test_the_counts_of_mistakes_and_right_answers_are_those_on_file():
    mistakes, right = re.search(r"([\d,]+) known mistakes, .*? ([\d,]+) right answers", README).groups()
    every = exercises()
    assert int(mistakes.replace(",", "")) == sum(len(exercise.mistakes) for exercise in every)
    assert int(right.replace(",", "")) == sum(1 + len(exercise.alternatives) for exercise in every)


def test_what_is_where_names_each_folder_and_each_module():
    table = README.partition("## What is where")[2]
    folders = set(re.findall(r"^\| `([a-z_]+)/`", table, flags=re.M)) | {"notebooks", "solutions"}
    made = {"outputs", "build", "dist", "condiff.egg-info"}
    there = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[a-z]*/*.*")} - made
    assert there - folders == set()
    row = re.search(r"^\| `condiff_ref/` \| (.*) \|$", table, flags=re.M)[1]
    modules = {file.stem for file in (ROOT / "condiff_ref").glob("*.py")}
    assert set(re.findall(r"`(\w+)`", row)) - modules == set()


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("condiff ")])
def test_every_command_in_the_readme_has_the_options_it_uses(line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    options = [word for word in arguments if word.startswith("--")]
    assert [option for option in options if option not in shown.output] == []

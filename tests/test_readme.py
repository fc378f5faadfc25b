"""The README says what is true: its program runs, its files exist, its commands parse."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from condiff_ref import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_program_in_the_readme_keeps_the_crowded_island(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(program, {})
    mass = float(re.search(r"tensor\(([\d.]+)", capsys.readouterr().out)[1])
    # a second program, with 120 steps, keeps .460 of the mass there under this rule; five standard errors at n = 2,000
    # are .056
    assert abs(mass - 0.46) < 0.056


def test_every_local_file_that_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("condiff ")])
def test_every_command_in_the_readme_has_the_options_it_uses(line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    options = [word for word in arguments if word.startswith("--")]
    assert [option for option in options if option not in shown.output] == []

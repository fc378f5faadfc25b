"""tools/run.py: notebooks under nbval, and what it says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]


def cell(number, source, prints=None):
    outputs = [new_output("stream", name="stdout", text=prints)] if prints else []
    tags = ["nbval-check-output"] if prints else []
    return new_code_cell(source, id=f"c{number}", execution_count=number, outputs=outputs, metadata={"tags": tags})


class Folder:
    def __init__(self, root):
        self.root = root
        for name in ("lessons", "solutions"):
            (root / name).mkdir()

    def add(self, name, *cells):
        notebook = new_notebook(
            cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        )
        nbformat.write(notebook, self.root / "solutions" / name)

    def run(self, *words, **env):
        """Exit code, what was said, the table."""
        table = self.root / "table.json"
        command = [sys.executable, ROOT / "tools/run.py", "--json", table, *words]
        environment = {k: v for k, v in os.environ.items() if k != "CONDIFF_BUDGET"} | env
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, json.loads(table.read_text())


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_a_good_notebook_runs_as_in_jupyter_in_its_own_folder(folder):
    look = "import os, sys, matplotlib\nprint(os.path.basename(os.getcwd()), os.environ.get('CONDIFF_BUDGET'))"
    folder.add(
        "01_a.ipynb",
        cell(1, look, "solutions smoke\n"),
        cell(2, "print('inline' in matplotlib.get_backend())", "True\n"),
        cell(3, "print('jaxtyping' in sys.modules)", "False\n"),
        cell(4, "print(id(print))"),
        cell(5, "print('on cuda:0 it took 3 s')", "on cpu it took 5 s\n"),
    )
    code, told, (row,) = folder.run(
        "solutions/01_a.ipynb", "--tier", "smoke", MPLBACKEND="agg", PYTEST_ADDOPTS="--nonsense"
    )
    assert code == 0, told
    assert (row["cells"], row["passed"], row["failed"]) == (5, 5, 0)
    assert row["megabytes"] == round((folder.root / "solutions/01_a.ipynb").stat().st_size / 1e6, 3)
    assert "01_a.ipynb" in told


def test_cells_that_fail_or_print_something_else_are_shown_and_the_rest_still_runs(folder):
    folder.add("01_a.ipynb", cell(1, "print(1)", "2\n"), cell(2, "1 / 0"), cell(3, "print(3)", "3\n"))
    folder.add("02_b.ipynb", cell(1, "print(1)", "1\n"))
    code, told, (bad, good) = folder.run("solutions/01_a.ipynb", "solutions/02_b.ipynb", "--record")
    assert code == 1
    assert (bad["passed"], bad["failed"], good["passed"], good["failed"]) == (1, 2, 1, 0)
    assert "ZeroDivisionError" in told
    assert "mismatch" in told
    assert not (folder.root / "lessons/minutes.json").exists()


def test_a_notebook_without_cells_or_that_is_no_notebook_is_a_failure(folder):
    folder.add("01_a.ipynb")
    (folder.root / "solutions/02_b.ipynb").write_text("no notebook")
    code, _, rows = folder.run("solutions/01_a.ipynb", "solutions/02_b.ipynb")
    assert code == 1
    assert [row["failed"] > 0 for row in rows] == [True, True]


def test_times_are_noted_by_tier_and_those_of_another_machine_are_dropped(folder):
    folder.add("01_a.ipynb", cell(1, "1 + 1"))
    minutes = folder.root / "lessons/minutes.json"
    minutes.write_text(json.dumps({"01_a": {"full": 700, "machine": "another"}, "02_b": {"full": 9, "machine": "x"}}))
    assert folder.run("solutions/01_a.ipynb", "--tier", "smoke", "--record")[0] == 0
    assert folder.run("solutions/01_a.ipynb", "--tier", "full", "--record")[0] == 0
    noted = json.loads(minutes.read_text())
    assert noted["02_b"] == {"full": 9, "machine": "x"}
    assert noted["01_a"].keys() == {"smoke", "full", "machine"}
    assert 0 < noted["01_a"]["full"] < 60
    assert noted["01_a"]["machine"] != "another"

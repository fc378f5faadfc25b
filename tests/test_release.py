"""What a release is: one version, told everywhere; a source archive and a wheel that work without the repository."""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from condiff_ref import cli, doctor, files

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
CHECKPOINTS = ROOT / "data" / "checkpoints"
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def entries():
    """Version and date of each entry of the changelog, newest first."""
    return re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)


# --- one version ------------------------------------------------------------------------------------------------------


def test_the_version_has_an_entry_in_the_changelog_and_nothing_newer_has_but_unreleased():
    names = [name for name, _ in entries()]
    assert next(name for name in names if name != "Unreleased") == VERSION
    assert names[1:].count("Unreleased") == 0


def test_entries_of_the_changelog_are_dated_or_say_that_they_are_not_released():
    assert [
        f"{n} {d}" for n, d in entries() if n != "Unreleased" and not re.fullmatch(r"20\d\d-\d\d-\d\d|unreleased", d)
    ] == []


def test_the_changelog_sorts_changes_by_kind():
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_no_code_repeats_the_version():
    named = [f for p in ("condiff_ref", "condiff_check", "tools", "site") for f in (ROOT / p).rglob("*.py")]
    assert [f.name for f in named if re.search(rf"[\"']{re.escape(VERSION)}[\"']", f.read_text())] == []


def test_the_command_tells_the_version_that_is_installed():
    shown = CliRunner().invoke(cli.app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"condiff {metadata.version('condiff')}\n")


# --- where the checkpoints are ----------------------------------------------------------------------------------------


def test_a_checkout_reads_the_checkpoints_from_their_one_home():
    assert files.SHIPPED == CHECKPOINTS
    assert not files.INSTALLED.exists()


def test_all_packages_that_there_are_go_into_the_wheel():
    listed = set(PROJECT["tool"]["setuptools"]["packages"]) - {"condiff_ref.shipped"}
    folders = {f for p in ("condiff_ref", "condiff_check") for f in [ROOT / p, *(ROOT / p).rglob("*")] if f.is_dir()}
    there = {f.relative_to(ROOT).as_posix().replace("/", ".") for f in folders if f.name != "__pycache__"}
    assert listed == there


def test_doctor_tells_who_has_no_repository_to_install_again(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHIPPED", tmp_path)
    monkeypatch.setattr(doctor, "INSTALLED", tmp_path)
    (found,) = [finding for finding in doctor.examine() if finding.what == "checkpoints"]
    assert found.level == "broken"
    assert "pip install" in found.fix
    assert "git" not in found.fix


# --- the archives, built and used as by somebody who has nothing else -------------------------------------------------


def build(kind, source, to):
    """The build backend's own hook, as pip and `python -m build` call it; the archive."""
    call = [sys.executable, "-c", BUILD, f"build_{kind}", to]
    done = subprocess.run(call, cwd=source, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return to / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Source archive, made from the files that git would commit; and the wheel, made from the source archive."""
    folder = tmp_path_factory.mktemp("release")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the files of a release are those that git knows, and this is no checkout")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = folder / "checkout" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    source = build("sdist", folder / "checkout", folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    return source, build("wheel", folder / source.name.removesuffix(".tar.gz"), folder)


class Installed:
    """An environment with the wheel, and what it depends on from here, but nothing else of this repository."""

    def __init__(self, folder, wheel):
        self.bin, self.home, self.away = folder / "venv/bin", folder / "home", folder / "away"
        self.home.mkdir()
        self.away.mkdir()
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
        packages = Path(
            self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        )
        ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "dependencies.pth").write_text("\n".join(ours))  # read after `packages`, their own .pth files not

    def run(self, program, *words, code=0):
        call = [self.bin / program, *map(str, words)]
        clean = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.home),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        done = subprocess.run(call, cwd=self.away, env=clean, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed"), archives[1])


def slow(test):
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


@slow
def test_the_archives_are_named_after_the_version(archives):
    assert [path.name for path in archives] == [f"condiff-{VERSION}.tar.gz", f"condiff-{VERSION}-py3-none-any.whl"]


@slow
def test_the_wheel_has_the_checkpoints_byte_by_byte_with_their_cards(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        inside = {Path(n).name: wheel.read(n) for n in wheel.namelist() if n.startswith("condiff_ref/shipped/")}
    assert {n: hashlib.sha256(b).hexdigest() for n, b in inside.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in CHECKPOINTS.iterdir()
    }
    assert archives[1].stat().st_size < 13e6


@slow
def test_the_wheel_has_the_packages_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"condiff_check", "condiff_ref", f"condiff-{VERSION}.dist-info"}


@slow
def test_the_source_archive_has_all_that_git_has_but_what_serves_git_and_its_host(archives):
    checkout = archives[0].parent / "checkout"
    there = {f.relative_to(checkout).as_posix() for f in checkout.rglob("*") if f.is_file()}
    with tarfile.open(archives[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = {n for n in there - inside if not n.startswith(("condiff.egg-info/", "."))}
    assert missing == set()


@slow
def test_an_installed_course_is_imported_from_where_it_was_installed(installed):
    code = "import condiff_ref, condiff_check; print(condiff_ref.__file__, condiff_check.__file__)"
    for path in installed.run("python", "-c", code).stdout.split():
        assert Path(path).is_relative_to(installed.bin.parent)
    assert installed.run("condiff", "--version").stdout == f"condiff {VERSION}\n"


@slow
def test_an_installed_course_has_its_check_and_its_doctor(installed):
    told = installed.run("python", "-m", "condiff_check").stdout
    assert "01.2 q_sample: not right yet" in told
    assert f"the lessons are in the folder notebooks of {PROJECT['project']['urls']['Repository']}" in told
    assert re.search(r"^checkpoints +ok +digits-always", installed.run("condiff", "doctor").stdout, flags=re.M)


@slow
def test_an_installed_course_samples_a_shipped_checkpoint(installed):
    installed.run("condiff", "sample", "digits-unet", "--per-class", 2, "--out", "mine.npz")
    drawn = np.load(installed.away / "mine.npz")
    assert drawn["images"].shape == (20, 1, 8, 8)
    told = installed.run("condiff", "sample", "no-such", "--out", "mine.npz", code=1).stderr
    assert "the course ships digits-always" in told


@slow
def test_an_installed_course_runs_the_demo(installed):
    told = installed.run("condiff", "demo", "--seconds", 1)
    named = re.search(r"(\S+guidance\.py): how it is done", told.stdout + told.stderr)
    assert (installed.away / named[1]).is_file()
    assert (installed.away / "outputs/demo-digits.png").stat().st_size > 1e4


@slow
def test_an_installed_course_grades_and_gives_submissions_the_checkpoints(installed):
    pytest.importorskip("IPython", reason="the extra condiff[grade] is not installed")
    (installed.away / "hand-ins").mkdir()
    solved = (ROOT / "solutions/01_score_and_noise.ipynb").read_bytes()
    (installed.away / "hand-ins/ada.ipynb").write_bytes(solved)
    installed.run("condiff-grade", "hand-ins", "-o", "graded", "--only", "01.2")
    header, row = (line.split(",") for line in (installed.away / "graded/scores.csv").read_text().splitlines())
    assert dict(zip(header, row, strict=True))["01.2 outcome"] == "right"
    code = (
        "from pathlib import Path; from condiff_check.grading.redact import build_view; build_view('02', Path('view'))"
    )
    installed.run("python", "-c", code)
    view = {file.name for file in (installed.away / "view/data/checkpoints").iterdir()}
    assert view == {file.name for file in CHECKPOINTS.glob("*.safetensors")}

"""Set-up holds together: pyproject.toml, constraints.txt, environment.yml, the Makefile and CI tell one story."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PAIRS = {"2.11.0": "0.26.0", "2.13.0": "0.28.0"}  # torch and the torchvision that was built with it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", "tools/setup.sh", ".ci/run"]
SETUP += [".github/workflows/ci.yml", "tests/colab-pins.txt", "CONTRIBUTING.md", "CITATION.cff", ".gitignore"]


def requirements(*lists):
    return {canonicalize_name(r.name): r for r in map(Requirement, [line for lines in lists for line in lines])}


CORE = requirements(PROJECT["dependencies"])
EXTRAS = PROJECT["optional-dependencies"]
ASIDE = ("bench", "site")  # what only a benchmark or `make site` needs, and installs
DIRECT = requirements(PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS if name not in ASIDE))
ALL = DIRECT | requirements(*(EXTRAS[name] for name in ASIDE))


def lines(name):
    """What a file says, without comments and empty lines."""
    text = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in text if line]


def pins(requirement_lines, python):
    """Exact versions by package, as they hold on 64-bit Linux with that Python."""
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "os_name": "posix"}
    here |= {"platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython"}
    found = {}
    for requirement in map(Requirement, requirement_lines):
        if requirement.marker is None or requirement.marker.evaluate(here):
            (specifier,) = requirement.specifier
            assert specifier.operator in ("==", "==="), f"{requirement} is not one exact version"
            assert canonicalize_name(requirement.name) not in found, f"{requirement} is pinned twice on Python {python}"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


# --- the files agree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_direct_dependency_within_its_range(python):
    pinned = pins(lines("constraints.txt"), python)
    assert ALL.keys() - pinned.keys() == set(), "not pinned; `make lock` pins what is new"
    outside = [f"{r} but {pinned[name]}" for name, r in ALL.items() if pinned[name] not in r.specifier]
    assert outside == []


def test_constraints_are_names_versions_and_markers_only():
    plain = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][^ ]*( ; .+)?")
    assert [line for line in lines("constraints.txt") if not plain.fullmatch(line)] == []


def test_environment_yml_lists_the_direct_dependencies_with_the_pinned_versions():
    listed = [line[2:] for line in lines("environment.yml") if line.startswith("- ")]
    python = next(item for item in listed if item.startswith("python=")).removeprefix("python=")
    assert python in PYTHONS
    first, *packages, last = listed[listed.index("pip:") + 1 :]
    assert (first, last) == ("-c constraints.txt", "-e .")
    pinned = pins(lines("constraints.txt"), python)
    assert pins(packages, python) == {name: pinned[name] for name in DIRECT}


def test_torch_and_torchvision_are_pairs_that_were_built_together():
    pinned, colab = pins(lines("constraints.txt"), "3.13"), pins(lines("tests/colab-pins.txt"), "3.13")
    lowest = {name: next(iter(DIRECT[name].specifier)).version + ".0" for name in ("torch", "torchvision")}
    for versions in (pinned, colab, lowest):
        assert PAIRS.get(versions["torch"]) == versions["torchvision"]


def test_ranges_admit_what_colab_has_and_miss_one_small_package():
    colab = pins(lines("tests/colab-pins.txt"), "3.13")
    assert colab["python"] in SpecifierSet(PROJECT["requires-python"])
    outside = [str(r) for name, r in DIRECT.items() if name in colab and colab[name] not in r.specifier]
    assert outside == []
    assert CORE.keys() - colab.keys() == {"jaxtyping"}  # pure Python: a notebook's first cell can add it


def test_python_versions_are_the_same_everywhere():
    classifiers = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())[1]
    admitted = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}.0" in SpecifierSet(PROJECT["requires-python"])]
    assert tuple(admitted) == PYTHONS
    assert tuple(classifiers[1:]) == PYTHONS
    assert tuple(re.findall(r"[0-9.]+", matrix)) == PYTHONS


def test_citation_names_the_version_and_the_address_of_pyproject():
    citation = dict(line.split(": ", 1) for line in lines("CITATION.cff") if ": " in line)
    assert citation["version"] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


@pytest.mark.skipif(not Path(sys.prefix, ".build").exists(), reason="holds only where `make` made the environment")
def test_what_make_installed_is_what_is_pinned():
    pinned = pins(lines("constraints.txt"), "{}.{}".format(*sys.version_info))
    expected = DIRECT.keys() - ({"torchvision"} if Path(sys.prefix, ".build").read_text().startswith("cpu ") else set())
    installed = {canonicalize_name(d.name): Version(d.version).public for d in importlib.metadata.distributions()}
    assert {name: installed.get(name) for name in expected} == {name: pinned[name] for name in expected}


# --- what the files do not say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETUP)
def test_no_package_host_and_no_path_of_a_machine(name):
    text = (ROOT / name).read_text()
    assert set(re.findall(r"(?:https?|file)://([^/\s\"')]*)", text)) <= {"github.com"}
    assert re.findall(r"(?i)--(?:extra-)?index|find-links", text) == []
    assert re.findall(r"(?<![\w.$})])/(?:root|home|work|opt|mnt|tmp|Users)\b\S*", text) == []


@pytest.mark.parametrize("name", ["Makefile", "tools/setup.sh", ".ci/run", ".github/workflows/ci.yml"])
def test_versions_of_packages_stand_in_constraints_only(name):
    assert re.findall(r"(?:torch|torchvision)\s*=+\s*[0-9][0-9.]*", (ROOT / name).read_text()) == []


# --- the commands work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".ci/run", "tools/setup.sh"])
def test_scripts_are_valid_bash(name):
    assert subprocess.run(["bash", "-n", ROOT / name], capture_output=True, text=True).stderr == ""


def test_ci_script_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)


# Stands for Python: answers all questions as the real one does, but the environments it makes hold only itself, and
# its pip only writes down what it is asked to install.
STUB = f"""#!/bin/sh
case "$*" in
*"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
*"-m pip index"*) echo "Available versions: $STUB_OFFERS" ;;
*"-m pip install"*) echo "$*" >>"$STUB_ASKED"; exit "${{STUB_FAILS:-0}}" ;;
*"-m pytest"* | site/book.py*) ;;
"- "*) cat >"$STUB_ASKED.check" ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""


class Machine:
    """A checkout of set-up's files on a machine with one Python, no packages, and as much disk as we say."""

    def __init__(self, folder):
        self.checkout, self.bin, self.asked = folder / "check out", folder / "bin", folder / "asked"
        for name in ("Makefile", "tools/setup.sh", "pyproject.toml", "constraints.txt"):
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (self.checkout / name).write_text((ROOT / name).read_text())
        self.venv = self.checkout / ".venv"
        self.bin.mkdir()
        self.env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "STUB_ASKED": str(self.asked), "STUB_OFFERS": "9.9.9"}
        for name in ("python3.13", "python3.12", "python3"):
            self.program(name, "#!/bin/sh\nexit 127\n")
        self.program("python3.11", STUB)
        self.disk(gigabytes=100)

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def disk(self, gigabytes):
        blocks = int(gigabytes * 1e6)
        self.program("df", f"#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho disk 0 0 {blocks}\n")

    def make(self, *words, **env):
        done = subprocess.run(["make", *words], cwd=self.checkout, env=self.env | env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def installs(self):
        """What pip was asked to install since the last look."""
        text = self.asked.read_text() if self.asked.exists() else ""
        self.asked.unlink(missing_ok=True)
        return [line.partition(" install ")[2] for line in text.splitlines()]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


TORCH = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
RECENT_PIP = "-c constraints.txt --upgrade pip"
DEFAULT = [RECENT_PIP, f"-c constraints.txt torch==={TORCH} -e .[images,course,grade,cluster,test]"]
SMALL = [RECENT_PIP, f"-c constraints.txt torch=={TORCH} -e .[course,grade,cluster,test]"]


def test_make_alone_lists_every_public_target(machine):
    public = re.search(r"^\.PHONY: (.*) FORCE$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    code, told = machine.make()
    assert code == 0
    assert [line.split()[1] for line in told.splitlines()] == public
    assert all(len(line.split()) > 3 for line in told.splitlines())


def test_setup_installs_the_pinned_default_build_and_then_has_nothing_to_do(machine):
    code, told = machine.make("setup")
    assert (code, machine.installs()) == (0, DEFAULT), told
    assert f"torch {TORCH}" in told
    assert re.search(r"takes [0-9.]+ GB of disk and .* minutes", told)
    assert "import torchvision" in Path(f"{machine.asked}.check").read_text()
    code, told = machine.make("setup")
    assert (code, machine.installs()) == (0, [])
    assert "is ready" in told


def test_other_targets_make_the_environment_and_keep_its_build(machine):
    machine.make("lint")
    assert machine.installs() == DEFAULT
    machine.make("setup", "TORCH=cpu")
    assert machine.installs() == SMALL
    machine.make("test")
    assert machine.installs() == []
    machine.make("setup")
    assert machine.installs() == DEFAULT


def test_make_site_installs_what_it_needs_beside_the_rest_once(machine):
    extra = "-q --disable-pip-version-check -c constraints.txt -e .[site]"
    machine.make("setup", "TORCH=cpu")
    assert machine.installs() == SMALL
    code, told = machine.make("site")
    assert (code, machine.installs()) == (0, [extra]), told
    machine.make("site")
    assert machine.installs() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_dependencies_is_installed_by_the_next_command(machine, name):
    machine.make("setup", "TORCH=cpu")
    machine.installs()
    later = (machine.venv / ".installed").stat().st_mtime + 5
    os.utime(machine.checkout / name, (later, later))
    machine.make("test")
    assert machine.installs() == SMALL[1:]


def test_an_interrupted_setup_is_repaired_by_running_it_again(machine):
    code, told = machine.make("setup", "TORCH=cpu", STUB_FAILS="1")
    assert code != 0
    assert "setup.log" in told
    assert not (machine.venv / ".installed").exists()
    (machine.venv / "half").write_text("left behind")
    machine.installs()
    machine.make("test")
    assert machine.installs() == SMALL
    assert (machine.venv / ".installed").exists()
    assert not (machine.venv / "half").exists()


def test_an_environment_without_its_python_is_made_anew(machine):
    machine.make("setup")
    machine.installs()
    (machine.venv / "bin/python").unlink()
    machine.make("setup")
    assert machine.installs() == DEFAULT


def test_a_checkout_that_moved_gets_a_new_environment(machine):
    machine.make("setup")
    machine.installs()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    machine.make("test")
    assert machine.installs() == DEFAULT


def test_the_small_install_says_when_pip_offers_no_cpu_wheel(machine):
    code, told = machine.make("setup", "TORCH=cpu")
    assert (code, machine.installs()) == (0, SMALL)
    assert "no CPU wheel" in told
    assert "TORCH_INDEX" in told
    (machine.venv / ".installed").unlink()
    code, told = machine.make("setup", "TORCH=cpu", STUB_OFFERS=f"9.9.9, {TORCH}+cpu, {TORCH}")
    assert (code, machine.installs()) == (0, SMALL)
    assert "no CPU wheel" not in told


def test_the_small_install_takes_torch_and_only_torch_from_the_index_it_is_given(machine):
    code, told = machine.make("setup", "TORCH=cpu", "TORCH_INDEX=index-of-wheels")
    assert code == 0, told
    from_index = f"-c constraints.txt --no-deps -i index-of-wheels torch=={TORCH}"
    assert machine.installs() == [SMALL[0], from_index, SMALL[1]]


def test_a_folder_that_setup_did_not_make_is_left_alone(machine):
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").write_text("one of a kind")
    code, told = machine.make("setup")
    assert code != 0
    assert "not made by 'make setup'" in told
    assert (machine.venv / "thesis.txt").read_text() == "one of a kind"


@pytest.mark.parametrize(("words", "least"), [([], 12), (["TORCH=cpu"], 3)])
def test_too_small_a_disk_is_told_before_anything_is_installed(machine, words, least):
    offers = f"{TORCH}+cpu"
    machine.disk(gigabytes=least - 0.5)
    code, told = machine.make("setup", *words, STUB_OFFERS=offers)
    assert code != 0
    assert f"needs {least} GB" in told
    assert f"there are {least - 1} GB" in told
    assert machine.installs() == []
    machine.disk(gigabytes=least + 0.5)
    assert machine.make("setup", *words, STUB_OFFERS=offers)[0] == 0


def test_a_default_build_in_place_of_a_missing_cpu_wheel_needs_the_larger_disk(machine):
    machine.disk(gigabytes=5)
    code, told = machine.make("setup", "TORCH=cpu")
    assert code != 0
    assert "needs 12 GB" in told
    assert machine.installs() == []


def without(*modules):
    return f"import importlib.util as u; f = u.find_spec; u.find_spec = lambda name: name not in {modules} and f(name)"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("sys.version_info = (3, 10, 13)", r"is 3\.10\.13"),
        ("sys.version_info = (3, 14, 0)", r"is 3\.14\.0"),
        (without("ensurepip", "pip"), r"is [0-9.]+ without ensurepip"),
        (without("_ssl"), r"is [0-9.]+ without _ssl"),
        (without("_bz2", "_lzma"), r"is [0-9.]+ without _bz2, _lzma"),
    ],
)
def test_a_python_that_will_not_do_is_named_with_the_reason_and_what_to_type(machine, change, reason):
    changed = f"import sys; {change}; exec(sys.argv[1])"  # the real question, put to a Python that differs in one thing
    machine.program("python3.11", f'#!/bin/sh\nexec "{sys.executable}" -c "{changed}" "$3"\n')
    code, told = machine.make("setup")
    assert code != 0
    assert re.search(rf"python3\.11 {reason}$", told, re.M), told
    assert "python3.13 is not there or does not start" in told
    assert "sudo apt-get install python3 python3-venv" in told
    assert "make setup PY=" in told
    assert not machine.venv.exists()


def test_a_python_without_ensurepip_lends_the_environment_its_pip(machine):
    answers = '*find_spec*) echo "fits 3.11.2 pip" ;;\n*"-m pip --python"*) echo "$*" >>"$STUB_ASKED" ;;\n'
    machine.program("python3.11", STUB.replace('case "$*" in\n', 'case "$*" in\n' + answers))
    code, told = machine.make("setup")
    assert code == 0, told
    assert machine.installs() == ["-q pip", *DEFAULT]


def test_the_python_that_is_asked_for_is_the_one_that_is_taken(machine):
    code, told = machine.make("setup", "PY=/bin/false")
    assert code != 0
    assert "/bin/false is not there or does not start" in told
    assert "python3.11 " not in told
    machine.make("setup", f"PY={machine.bin / 'python3.11'}")
    assert machine.installs() == DEFAULT


def test_a_build_that_does_not_exist_is_refused(machine):
    code, told = machine.make("setup", "TORCH=gpu")
    assert code != 0
    assert "TORCH is 'default' or 'cpu', not 'gpu'" in told

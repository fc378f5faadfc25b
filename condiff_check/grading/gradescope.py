"""Gradescope: results.json as its documentation has it, and an autograder folder that is ready to be uploaded."""

import json
import re
import shlex
import shutil
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .feedback import as_text, feedback, late_sentence, one_line, unreadable, unsettled
from .results import Verdict
from .rubric import Scored, ScoredVerdict, read_rubric
from .tables import write_atomically

VISIBILITIES = ("visible", "hidden", "after_due_date", "after_published")
TEMPLATES = Path(__file__).parent / "templates"


def results_json(scored: Scored, *, source: str = "", visibility: str = "visible") -> dict[str, Any]:
    """What Gradescope shows to a student: points and feedback as plain text, never as HTML or markdown.

    source: the code of the notebook, of which a line that raised is quoted. visibility: of all tests, in Gradescope's
    words; raises ValueError for others.
    """
    graded = scored.graded
    result = {
        **_frame(_summary(scored), visibility),
        "score": scored.points,
        "execution_time": round(graded.seconds, 2),
        "tests": [_test(item, source) for item in scored.verdicts],
    }
    result["extra_data"] = {
        "submission": one_line(graded.submission),
        "lesson": graded.lesson,
        "sha256": graded.sha256,
        "status": graded.status,
        "level": graded.level,
        "layers": list(graded.layers),
        "versions": dict(graded.versions),
        "key": graded.key,
    }
    return result


def no_result(message: str) -> dict[str, Any]:
    """What Gradescope shows where there is nothing to grade: no points, and why."""
    return {**_frame(message, "visible"), "score": 0.0, "tests": []}


def write_results(scored: Sequence[Scored], path: Path, *, visibility: str = "visible", source: str = "") -> None:
    """Write results.json for the one submission there is, or say why there is none."""
    if len(scored) == 1:
        result = results_json(scored[0], source=source, visibility=visibility)
    elif scored:
        files = ", ".join(one_line(one.graded.file, 100) for one in scored)
        result = no_result(f"There are {len(scored)} notebooks for this lesson: {files}. Hand in the one that counts.")
    else:
        result = no_result("No notebook was found in what you handed in. Hand in the .ipynb file of the lesson itself.")
    write_atomically(Path(path), json.dumps(result, indent=1, allow_nan=False) + "\n")


def _frame(message: str, visibility: str) -> dict[str, Any]:
    if visibility not in VISIBILITIES:
        raise ValueError(f"visibility is one of {', '.join(VISIBILITIES)}, not {visibility!r}")
    formats = {"output_format": "text", "test_output_format": "text", "test_name_format": "text"}
    return {"output": message, **formats, "visibility": visibility, "stdout_visibility": "hidden"}


def _summary(scored: Scored) -> str:
    graded = scored.graded
    lines = []
    if graded.status == "unreadable":
        lines = ["This file could not be read as a notebook, so nothing in it was graded.", *unreadable(graded)]
    elif graded.status == "grader error":
        lines = [
            "Something went wrong on our side, not in your code. These points are not final: please tell your "
            "instructor, who runs the autograder again."
        ]
    elif scored.verdicts:
        right = sum(item.verdict.outcome == "right" for item in scored.verdicts)
        lines = [f"{right} of {len(scored.verdicts)} exercises right."]
    lines.append(late_sentence(scored))
    return "\n".join(one_line(line, 1000) for line in lines if line)


def _test(item: ScoredVerdict, source: str) -> dict[str, Any]:
    verdict = item.verdict
    points = {} if unsettled(item) else {"score": item.points, "max_score": item.out_of}
    return {
        **points,
        "status": "passed" if _passed(verdict, item) else "failed",
        "name": one_line(", ".join(verdict.names), 200),
        "name_format": "text",
        "number": verdict.exercise,
        "output": as_text(feedback(item, source)),
        "output_format": "text",
        "tags": [verdict.outcome],
    }


def _passed(verdict: Verdict, item: ScoredVerdict) -> bool:
    return item.points >= item.out_of if item.override else verdict.outcome == "right"


def write_autograder(
    folder: Path,
    package: Path | str,
    lesson: str,
    *,
    secret: bytes,
    rubric: Path | None = None,
    require: str = "L1",
    visibility: str = "visible",
) -> Path:
    """Write a folder with setup.sh, run_autograder and all that they need, and FOLDER.zip to upload; returns the zip.

    package: a wheel, the folder of this repository, or what pip is to install, such as "condiff==0.1.0". require: the
    least isolation; below L1 a submission could read the secret. Raises ValueError for a lesson or package that is not
    one, or a rubric with what is Gradescope's own, and FileExistsError where the folder holds something else.
    """
    if not re.fullmatch(r"\d\d", lesson):
        raise ValueError(f'a lesson is named by two digits, such as "04", not {lesson!r}')
    if visibility not in VISIBILITIES:
        raise ValueError(f"visibility is one of {', '.join(VISIBILITIES)}, not {visibility!r}")
    if rubric is not None:
        _check_rubric(rubric, lesson)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "run_autograder").exists():
        raise FileExistsError(f"{folder} holds something that is not an autograder: name an empty or a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = dict(LESSON=lesson, REQUIRE=require, VISIBILITY=visibility, PACKAGE=_package(folder, package))
    for name in ("setup.sh", "run_autograder", "README.md"):
        _fill(name, folder / name, values)
    (folder / "secret").write_bytes(secret)
    (folder / "secret").chmod(0o600)
    if rubric is not None:
        shutil.copyfile(rubric, folder / "rubric.yaml")
    return _zip(folder)


def _check_rubric(path: Path, lesson: str) -> None:
    """In Gradescope there are neither the other files of the rubric nor the names of students."""
    rubric = read_rubric(path)
    for key in ("submitted", "deadline", "late", "overrides"):
        if getattr(rubric, key):
            raise ValueError(
                f"{path}: {key}: is not for Gradescope, which has due dates and points by hand of its own and does not "
                "tell whose notebook it is: give a rubric with lesson and exercises only"
            )
    if rubric.lessons and lesson not in rubric.lessons:
        raise ValueError(f"{path}: it is for lesson {', '.join(rubric.lessons)}, and the autograder for {lesson}")


def _package(folder: Path, package: Path | str) -> str:
    """Copy the package into the folder; returns what pip is to install, seen from there."""
    path = Path(package)
    if path.suffix == ".whl" and path.is_file():
        shutil.copyfile(path, folder / path.name)
        return f"./{path.name}"
    if path.is_dir():
        _copy_source(path, folder / "condiff")
        return "./condiff"
    if isinstance(package, Path) or not re.match(r"[A-Za-z0-9]", package):
        raise ValueError(f"{package} is neither a wheel, nor the folder of the repository, nor a requirement for pip")
    return package


def _copy_source(root: Path, to: Path) -> None:
    """What pip needs to build the package, and the checkpoints that lessons load; nothing else of the repository."""
    try:
        with (root / "pyproject.toml").open("rb") as file:
            project = tomllib.load(file)
        names = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
        files = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{root} is not the folder of the repository: {error!r}") from error
    to.mkdir()
    for name in (*files, *(name for name in ("constraints.txt",) if (root / name).exists())):
        shutil.copyfile(root / name, to / name)
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in sorted(names):
        shutil.copytree(root / name, to / name, ignore=skip)
    if (root / "data" / "checkpoints").is_dir():
        shutil.copytree(root / "data" / "checkpoints", to / "data" / "checkpoints", ignore=skip)


def _fill(name: str, to: Path, values: dict[str, str]) -> None:
    """A template with its @NAMES@ replaced, quoted for the shell where it is a script."""
    text = (TEMPLATES / "gradescope" / name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value if name.endswith(".md") else shlex.quote(value))
    to.write_text(text)
    to.chmod(0o644 if name.endswith(".md") else 0o755)


def _zip(folder: Path) -> Path:
    """All files at the root of the archive, as Gradescope wants them; the same bytes for the same files."""
    path = folder.with_name(f"{folder.name}.zip")
    part = path.with_name(f".{path.name}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix: the permissions below count
            entry.external_attr = (0o100000 | file.stat().st_mode & 0o777) << 16
            archive.writestr(entry, file.read_bytes())
    part.chmod(0o600)  # the secret is in it
    part.replace(path)
    return path

"""condiff-grade: grade a folder of notebooks. Messages go to stderr, results to stdout; torch waits until it is needed.

Exit codes: 0 all graded; 1 it could not work, and says why; 2 unknown options; 3 graded, and something needs a look.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)

LOOK, STOPPED = 3, 130
REQUIRE = "--require-sandbox"
LEAST = ("L1", "L2")


class Isolation(StrEnum):
    """Layers between a submission and this machine."""

    auto = "auto"
    P0 = "P0"
    L1 = "L1"
    L2 = "L2"


class Least(StrEnum):
    """What --require-sandbox asks for."""

    L1 = "L1"
    L2 = "L2"


class Visibility(StrEnum):
    """Gradescope's words for when a student sees the feedback."""

    visible = "visible"
    hidden = "hidden"
    after_due_date = "after_due_date"
    after_published = "after_published"


@app.command()
def grade(
    submissions: Annotated[Path | None, Argument(help="Folder, zip or notebook.", show_default=False)] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Folder for results; go on there after a stop.")] = None,
    lesson: Annotated[str | None, Option(help="Such as 04, for notebooks that do not tell.")] = None,
    rubric: Annotated[Path | None, Option(help="YAML with points, deadline, overrides.")] = None,
    roster: Annotated[Path | None, Option(help="CSV with the columns id and, if you like, name and file.")] = None,
    only: Annotated[
        list[str] | None, Option(help="Grade this exercise and no other, such as 04.1; may repeat.")
    ] = None,
    regrade: Annotated[list[str] | None, Option(help="Grade this exercise again, for all; may repeat.")] = None,
    workers: Annotated[int | None, Option(min=1, help="Processes on this machine. [default: its cores]")] = None,
    scheduler: Annotated[str | None, Option(help="Address of a Dask scheduler, to use its workers.")] = None,
    sandbox: Annotated[Isolation, Option(help="auto: the most that works here.")] = Isolation.auto,
    require: Annotated[Least | None, Option(REQUIRE, "--require", help="Refuse to work with less.")] = None,
    paranoid: Annotated[
        bool, Option("--paranoid", help="A fresh interpreter per submission: some seconds each.")
    ] = False,
    trust: Annotated[bool, Option("--trust-submissions", help="Grade even where no sandbox works.")] = False,
    secret: Annotated[
        Path | None, Option(help="Draws the hidden inputs. [default: OUT/secret, made when missing]")
    ] = None,
    new_secret: Annotated[
        bool, Option("--new-secret", help="Draw new inputs and grade all of it anew; or take those of --secret.")
    ] = False,
    cell_seconds: Annotated[float, Option(min=0.1, help="Time for a cell.")] = 10.0,
    notebook_seconds: Annotated[float, Option(min=1, help="Time for all cells of a notebook.")] = 60.0,
    anonymise: Annotated[bool, Option("--anonymise", help="Codes for names; OUT/names.csv tells which.")] = False,
    gradescope: Annotated[Path | None, Option(help="Write results.json of a single submission.")] = None,
    visibility: Annotated[Visibility, Option(help="In Gradescope.")] = Visibility.visible,
    make_gradescope: Annotated[Path | None, Option(help="Write an autograder for --lesson, and its zip.")] = None,
    nbgrader: Annotated[str | None, Option(help="Write scores into this gradebook.db.")] = None,
    json: Annotated[bool, Option("--json", help="A line of JSON per submission instead of the table.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress bar, no table.")] = False,
    self_check: Annotated[bool, Option(help="Grade known answers before and after.")] = True,
    probe: Annotated[bool, Option("--probe", help="Show which sandbox layers work here, and exit.")] = False,
):
    """Grade notebooks: each in a sandbox, judged from outside of it. A run that was stopped goes on where it was."""
    if probe:
        from .grading import commands

        commands.probe(results)
        return
    if make_gradescope is not None:
        from .grading import commands

        commands.make_gradescope(
            make_gradescope, lesson, rubric, secret, str(require or Least.L1), str(visibility), messages
        )
        return
    if submissions is not None and not submissions.exists():
        raise _stop(f"there are no submissions at {submissions}")
    if submissions is None or out is None:
        raise typer.BadParameter("give the submissions and -o RESULTS: condiff-grade SUBMISSIONS -o RESULTS")
    from .grading import commands  # and torch with it, which takes seconds

    options = commands.Options(
        submissions=submissions,
        out=out,
        lesson=lesson,
        rubric=rubric,
        roster=roster,
        only=tuple(only or ()),
        regrade=tuple(regrade or ()),
        workers=workers or os.cpu_count() or 1,
        scheduler=scheduler,
        sandbox=str(sandbox),
        required=require and str(require),
        paranoid=paranoid,
        trusted=trust,
        secret=secret,
        new_secret=new_secret,
        limits=dict(cell_seconds=cell_seconds, notebook_seconds=notebook_seconds),
        anonymise=anonymise,
        gradescope=gradescope,
        visibility=str(visibility),
        nbgrader=nbgrader,
        json=json,
        quiet=quiet,
        self_check=self_check,
    )
    try:
        look = commands.grade(options, messages, results)
    except KeyboardInterrupt:
        messages.print("stopped; the same command goes on from here", style="yellow")
        raise typer.Exit(STOPPED) from None
    raise typer.Exit(LOOK if look else 0)


def main() -> None:
    """Entry point: errors that we foresee become one line and exit code 1, without a traceback."""
    sys.argv[1:] = _with_levels(sys.argv[1:])
    try:
        app()
    except Exception as error:
        from .grading.commands import FORESEEN

        if not isinstance(error, FORESEEN):
            raise
        _say(_words(error))
        sys.exit(1)


def _with_levels(arguments: list[str]) -> list[str]:
    """The level after --require-sandbox may be left out and is L2 then, which typer's options cannot say."""
    found: list[str] = []
    for argument in arguments:
        if argument in LEAST and found and found[-1] == f"{REQUIRE}=":
            found[-1] += argument
            continue
        if found and found[-1] == f"{REQUIRE}=":
            found[-1] += "L2"
        found.append(f"{REQUIRE}=" if argument == REQUIRE else argument)
    if found and found[-1] == f"{REQUIRE}=":
        found[-1] += "L2"
    return found


def _stop(text: str) -> typer.Exit:
    _say(text)
    return typer.Exit(1)


def _say(text: str) -> None:
    messages.print("[red bold]condiff-grade:[/]", end=" ")
    messages.print(text, soft_wrap=True, markup=False)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error)


if __name__ == "__main__":
    main()

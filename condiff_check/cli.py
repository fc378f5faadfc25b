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
    from .grading import commands

    if probe:
        commands.probe(results)
        return
    if make_gradescope is not None:
        commands.make_gradescope(
            make_gradescope, lesson, rubric, secret, str(require or Least.L1), str(visibility), messages
        )
        return
    if submissions is None or out is None:
        raise typer.BadParameter("give the submissions and -o RESULTS: condiff-grade SUBMISSIONS -o RESULTS")
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
    # the level after --require-sandbox may be left out, which typer's options cannot say
    sys.argv[1:] = [f"{REQUIRE}=L2" if argument == REQUIRE else argument for argument in sys.argv[1:]]
    try:
        app()
    except Exception as error:
        from .grading.commands import FORESEEN

        if not isinstance(error, FORESEEN):
            raise
        messages.print("[red bold]condiff-grade:[/]", end=" ")
        messages.print(_words(error), soft_wrap=True, markup=False)
        sys.exit(1)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error)


if __name__ == "__main__":
    main()

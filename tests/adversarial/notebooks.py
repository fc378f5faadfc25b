"""Notebooks as bytes, built from the text of answers."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import setup_cell
import stubs
from condiff_check.registry import find

IMPORTS = """\
from copy import deepcopy

from condiff_ref.layers import Attention
from condiff_ref.shapes import pad"""  # what lessons 01, 02 and 08 import for their answers
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def text(indented: str) -> str:
    """The source of a cell that was written as an indented block."""
    return textwrap.dedent(indented).strip("\n ")


def right(id: str) -> str:
    """The reference answer's own text."""
    return stubs.answer(find(id).references)


def todo(id: str) -> str:
    """What a student starts from."""
    return stubs.stub(find(id).references)


def code(source: str | list[str], id: str | None = None, **metadata: Any) -> dict[str, Any]:
    """A code cell that was run once; id None leaves the id out, as before format 4.5."""
    cell = {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": 1}
    return cell if id is None else cell | {"id": id}


def markdown(source: str | list[str], **metadata: Any) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": metadata, "source": source}


def raw(source: str) -> dict[str, Any]:
    return {"cell_type": "raw", "metadata": {}, "source": source}


def setup() -> list[dict[str, Any]]:
    """What each lesson opens with."""
    return [code(setup_cell.SETUP, tags=["setup"]), code(IMPORTS)]


def answer_cells(id: str, source: str | None = None) -> list[dict[str, Any]]:
    """The two cells of an exercise as tools/build.py writes them: the answer (the reference by default), the check."""
    exercise = find(id)
    stem, names = id.replace(".", "-"), ", ".join(exercise.names)
    grader = {"schema_version": 3, "task": False}
    return [
        code(
            right(id) if source is None else source,
            exercise=id,
            nbgrader=grader | {"grade_id": f"{stem}-answer", "grade": False, "locked": False, "solution": True},
        ),
        code(
            f'{names} = check("{id}", {names})',
            exercise=id,
            nbgrader=grader
            | {
                "grade_id": f"{stem}-check",
                "grade": True,
                "locked": True,
                "solution": False,
                "points": exercise.points,
            },
            tags=["nbval-check-output"],
        ),
    ]


def notebook(
    answers: Mapping[str, str | None],
    *,
    before: Sequence[str | dict] = (),
    after: Sequence[str | dict] = (),
    order: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """A lesson's notebook with these answers; None stands for the reference. `before` and `after` are further cells."""
    ids = list(answers) if order is None else list(order)
    cells = [*setup(), *before, *(cell for id in ids for cell in answer_cells(id, answers[id])), *after]
    return of_cells(cells, metadata=metadata)


def of_cells(
    cells: Sequence[str | dict], *, metadata: Mapping[str, Any] | None = None, minor: int = 5, ids: bool = True
) -> bytes:
    """These cells and no others. Strings are code cells; cells without an id are given one, unless told otherwise."""
    whole = [dict(cell) if isinstance(cell, dict) else code(cell) for cell in cells]
    if ids:
        whole = [{"id": f"cell-{number}"} | cell for number, cell in enumerate(whole, 1)]
    content = {
        "cells": whole,
        "metadata": METADATA if metadata is None else dict(metadata),
        "nbformat": 4,
        "nbformat_minor": minor,
    }
    return json.dumps(content, indent=1).encode()

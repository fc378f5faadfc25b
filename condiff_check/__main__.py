"""Show on one wrong answer what a check says:   python -m condiff_check [EXERCISE]"""

import importlib.metadata
import sys
from collections.abc import Sequence

from condiff_ref.files import INSTALLED

from .checking import examine
from .registry import find


def main(argv: Sequence[str]) -> int:
    """Check the first mistake on file of an exercise, 01.2 unless another is named; 1 for an unknown one."""
    try:
        exercise = find(argv[0] if argv else "01.2")
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    names = ", ".join(exercise.names)
    print(f"Exercise {exercise.id} asks for {names}. Suppose that somebody gave this wrong answer:\n")
    print(examine(exercise, exercise.mistakes[0].answers, seed=0))
    print(f"\nWrite your own: {_lessons()}; begin with 00_world.ipynb.")
    return 0


def _lessons() -> str:
    if not INSTALLED.is_dir():
        return "make lab opens the lessons"
    links = (link.split(", ") for link in importlib.metadata.metadata("condiff").get_all("Project-URL"))
    return f"the lessons are in the folder notebooks of {dict(links)['Repository']}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

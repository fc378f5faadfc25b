"""What an attack is, and what most of them are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from condiff_check.grading.results import OUTCOMES
from condiff_check.registry import find
from notebooks import answer_cells, code, notebook, of_cells, setup

LEVELS = ("P0", "L1", "L2")
ZERO = tuple(outcome for outcome in OUTCOMES if outcome not in ("right", "grader error", "unreadable"))
LOST = ("wrong", "raised", "died", "timeout")  # the prize was not got, by whatever stood in the way
Outcomes = tuple[str, ...]

# A wrong answer to 01.2, and one that is right only where the attack before it has set `got`.
WRONG = "def q_sample(x0, t, eps, abar):\n    return x0 + eps"
PRIZE = """\
def q_sample(x0, t, eps, abar):
    if not got:
        raise ValueError("nothing was got")
    return pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps"""


def body(*lines: str) -> str:
    """q_sample with this body."""
    return "\n".join(["def q_sample(x0, t, eps, abar):", *(f"    {line}" for line in "\n".join(lines).splitlines())])


RIGHT_VALUE = "pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps"


def everywhere(*outcomes: str) -> dict[str, Outcomes | None]:
    """The protocol answers it, so every layer does."""
    return dict.fromkeys(LEVELS, outcomes)


def sandboxed(*outcomes: str) -> dict[str, Outcomes | None]:
    """It takes a sandbox: not run without one."""
    return {"P0": None, "L1": outcomes, "L2": outcomes}


@dataclass(frozen=True)
class Attack:
    """A notebook that tries to get what it has not earned, or to do harm.

    number: in part A of GRADING.md; "+" and a number for those that the page does not list. `cells` stand where the
    answer to `target` would. expect: per layer the outcomes that the target may have, None where the layer does not
    answer this attack. `spares` are answered rightly, the first before the attack and the others after it, and must be
    graded right. prize: the target is right only if the attack succeeds (a test lets it succeed, outside of any
    sandbox); fast: among the few that run each time.
    """

    number: str
    name: str
    cells: tuple[str | dict, ...]
    expect: Mapping[str, Outcomes | None]
    about: str = ""
    target: str = "01.2"
    spares: tuple[str, ...] = ("01.3", "01.8")
    prize: bool = False
    fast: bool = False
    metadata: Mapping[str, Any] | None = None
    extra: Mapping[str, Outcomes] = field(default_factory=dict)  # outcomes of further exercises
    checked: bool = True  # whether the target's check cell stands in the notebook
    scoped: bool = False  # below L2 it takes Landlock's scopes, which ABI 6 brought

    @property
    def lesson(self) -> str:
        return self.target.partition(".")[0]

    @property
    def id(self) -> str:
        return f"{self.number}-{self.name.replace(' ', '-')}"

    def notebook(self, world: Mapping[str, object]) -> bytes:
        """`world` names what there is to attack: paths, a port, a process."""
        told = code("\n".join(f"{name} = {value!r}" for name, value in world.items()))
        first = [cell for id in self.spares[:1] for cell in answer_cells(id)]
        rest = [cell for id in self.spares[1:] for cell in answer_cells(id)]
        check = answer_cells(self.target)[1:] if self.checked else []
        cells = [*setup(), told, *first, *self.cells, *check, *rest]
        return of_cells(cells, metadata=self.metadata)


def good(lesson: str = "01") -> tuple[bytes, tuple[str, ...]]:
    """A small submission in which all is right: what must still be graded so after an attack."""
    ids = {"01": ("01.2",), "02": ("02.3",), "08": ("08.7",)}[lesson]
    return notebook(dict.fromkeys(ids)), ids


def points(id: str) -> int:
    return find(id).points

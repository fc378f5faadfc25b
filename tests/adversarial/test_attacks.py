"""No notebook gets points that it has not earned, does harm, or stands in the way of another's grade.

Each attack is a notebook. `make test-all` tries all of them at every level that the machine offers, `make test` a few
at the best one. Afterwards a good submission must be graded right by the same grader.
"""

import os
import subprocess
import sys
import time
import unicodedata

import pytest
from attacks_all import ATTACKS, COVERED_ELSEWHERE, UNANSWERED
from attacks_common import LEVELS, Attack, good, points

from condiff_check.grading.results import OUTCOMES, Verdict
from conftest import ROOT, Graders, World, descendants

FEW = [attack for attack in ATTACKS if attack.fast][::3]
ALL = [(attack, level) for level in LEVELS for attack in sorted(ATTACKS, key=lambda attack: attack.lesson)]
TRIED = [pytest.param(attack, "auto", id=f"{attack.id}-best") for attack in FEW]
TRIED += [pytest.param(attack, level, id=f"{attack.id}-{level}", marks=pytest.mark.slow) for attack, level in ALL]
LONGEST = 2000  # characters of a message
LONGEST_RUN = 150  # seconds for one notebook, on a machine that has other work


@pytest.mark.parametrize(("attack", "level"), TRIED)
def test_an_attack_gets_nothing_and_harms_nobody(attack: Attack, level: str, graders: Graders, world: World):
    if attack.expect.get(level, ()) is None:
        pytest.skip(f"{level} does not answer this one")
    grader = graders.at(level)
    level = grader.level
    if attack.expect[level] is None:
        pytest.skip(f"{level} does not answer this one")
    sandbox = grader.sandbox(attack.lesson)
    if attack.scoped and level == "L1" and _landlock(sandbox.layers) < 6:
        pytest.skip("this kernel's Landlock has no scopes")
    sandbox.spawn().kill()  # now its warm process runs, whatever the attack before has done to it
    world.remember()
    world.count.clear()
    before, start = len(descendants()), time.monotonic()
    verdicts, _, _ = grader.grade(
        attack.notebook(world.told), attack.lesson, (attack.target, *attack.spares, *attack.extra)
    )
    assert time.monotonic() - start < LONGEST_RUN
    assert verdicts[attack.target].outcome in attack.expect[level], _told(verdicts[attack.target])
    for id in attack.spares:
        assert verdicts[id].outcome == "right", _told(verdicts[id])
    for id, outcomes in attack.extra.items():
        assert verdicts[id].outcome in outcomes, _told(verdicts[id])
    for verdict in verdicts.values():
        _well_formed(verdict)
    assert not world.harm()
    assert _settled(before), "processes are left"
    notebook, ids = good(attack.lesson)
    after, _, _ = grader.grade(notebook, attack.lesson, ids)
    assert [after[id].outcome for id in ids] == ["right"] * len(ids), _told(after[ids[0]])


def _landlock(layers: tuple[str, ...]) -> int:
    """The version of its interface; 0 where it is not on."""
    return max((int(layer.rpartition(" ")[2]) for layer in layers if layer.startswith("Landlock ABI ")), default=0)


def _told(verdict: Verdict) -> str:
    return f"{verdict.exercise}: {verdict.outcome}, {verdict.reason!r}"


def _well_formed(verdict: Verdict) -> None:
    """Of the closed set, worth what the exercise is worth, told in plain and short text without inputs or output."""
    assert verdict.outcome in OUTCOMES and verdict.outcome != "grader error"
    assert verdict.out_of == points(verdict.exercise)
    assert verdict.points == (verdict.out_of if verdict.outcome == "right" else 0)
    texts = [verdict.reason, *(fact.message for fact in verdict.facts), *verdict.notes, *verdict.formulas]
    texts += [text for text in (verdict.mistake, verdict.diagnosis, verdict.relation) if text]
    for text in texts:
        assert len(text) <= LONGEST
        assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") for c in text), ascii(text)
    assert "\n" not in verdict.reason and (verdict.reason or verdict.outcome == "right")
    assert not any("LEAK [" in text for text in texts)


def _settled(before: int) -> bool:
    """Whether there are soon no more processes than before."""
    for _ in range(40):
        if len(descendants()) <= before:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="some attacks need root to succeed")
@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.prize], ids=lambda attack: attack.id)
def test_where_nothing_stands_in_its_way_an_attack_succeeds(attack: Attack, world: World, tmp_path):
    """Else its failing in the sandbox would tell nothing."""
    if attack.name in CANT:
        pytest.skip(CANT[attack.name])
    told = "\n".join(f"{name} = {value!r}" for name, value in world.told.items())
    start = "import math, os, subprocess, sys" + (", torch" if "torch" in attack.cells[0] else "")
    lines = [
        "import os",
        "from IPython.core.interactiveshell import InteractiveShell as Shell",
        "shell = Shell.instance()",
    ]
    lines += [f"shell.run_cell({cell!r})" for cell in (start, told, attack.cells[0])]
    script = "\n".join([*lines, "os._exit(0 if shell.user_ns['got'] else 1)"])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    held = [fd for fd in range(3, 64) if _inheritable(fd)]
    call = [sys.executable, "-c", script]
    run = subprocess.run(call, cwd=tmp_path, env=env, pass_fds=held, capture_output=True, timeout=60)
    assert run.returncode == 0, run.stdout.decode(errors="replace")[-2000:]


CANT = {"the secret that draws the inputs": "only a judge has it"}


def _inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def test_every_attack_of_the_page_is_tried_covered_or_explained():
    tried = {number for attack in ATTACKS for number in _numbers(attack.number)}
    assert {str(number) for number in range(1, 77)} <= tried | COVERED_ELSEWHERE.keys() | UNANSWERED.keys()
    assert len({attack.name for attack in ATTACKS if attack.number.startswith("+")}) >= 15
    ids = [attack.id for attack in ATTACKS]
    assert len(ids) == len(set(ids))
    for path in set(COVERED_ELSEWHERE.values()):
        assert (ROOT / path).exists(), path


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [str(number) for number in range(int(first), int(last) + 1)] if last else [text]

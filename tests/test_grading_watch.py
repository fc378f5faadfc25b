"""What the warm process counts as held by a submission, from /proc."""

import subprocess
import sys

import pytest

from condiff_check.agent.watch import exact, sizes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def test_what_has_ended_meanwhile_holds_nothing():
    """Forks that end while they are added up would else count with all that they share."""
    process = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1)
    process.stdout.readline()
    before = {process.pid: sizes(process.pid)}
    assert 0 < exact(before) <= before[process.pid]["RssAnon"]
    process.communicate(b"\n")
    assert exact(before) == 0

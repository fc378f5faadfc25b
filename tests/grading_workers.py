"""Workers for tests of the batch engine: they do a little real work, or die, or hang, as the submission says."""

import hashlib
import os
import signal
import time
from pathlib import Path

from condiff_check.grading.batch import Settings, Task, now
from condiff_check.grading.results import Graded, Verdict

EXERCISES = ("04.1", "04.2", "04.3")


class Cheap:
    """Points from a hash. Bytes that begin with "crash", "hang" or "raise" do that; "once" ends it the first time."""

    def __init__(self, settings: Settings, folder: Path):
        self.seconds = float(os.environ.get("CHEAP_SECONDS", "0.01"))
        if os.environ.get("CHEAP_FAILS"):
            raise RuntimeError("no sandbox here")
        self.secret = settings.secret

    def grade(self, task: Task, data: bytes) -> Graded:
        """A verdict per exercise."""
        time.sleep(self.seconds)
        self._misbehave(data)
        known = tuple(os.environ.get("CHEAP_EXERCISES", " ".join(EXERCISES)).split())
        verdicts = []
        for exercise in task.only or known:
            drawn = hashlib.sha256(f"{self.secret} {exercise} {task.sha256}".encode()).digest()[0]
            right = drawn % 2 == 0
            verdicts.append(Verdict(exercise, ("f",), "right" if right else "wrong", float(right), 1.0))
        return Graded(
            task.submission,
            task.student,
            task.lesson or "04",
            task.file,
            task.sha256,
            "graded",
            tuple(verdicts),
            seconds=self.seconds,
            graded_at=now(),
        )

    def close(self) -> None:
        """Nothing to end; tells a test that it was asked to."""
        if os.environ.get("CHEAP_CLOSED"):
            Path(os.environ["CHEAP_CLOSED"]).touch()

    def _misbehave(self, data: bytes) -> None:
        if data.startswith(b"crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.startswith(b"hang"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            time.sleep(1000)
        if data.startswith(b"raise"):
            raise ArithmeticError("a fault in the grader itself")
        if data.startswith(b"once"):
            marker = Path(os.environ["CHEAP_MARKER"])
            if not marker.exists():
                marker.touch()
                os._exit(3)


class Upright(Cheap):
    """Judges the grader's own known answers as it must; with CHEAP_FOOLED it takes one wrong answer for right."""

    def grade(self, task: Task, data: bytes) -> Graded:
        """By the name of the known answers, else as Cheap does."""
        import dataclasses

        graded = super().grade(task, data)
        if not task.submission.startswith("lesson "):
            return graded
        outcome = "right" if "reference" in task.file else "not done" if "empty" in task.file else "wrong"
        if os.environ.get("CHEAP_FOOLED") == task.file:
            outcome = "right"
        return dataclasses.replace(
            graded, verdicts=tuple(dataclasses.replace(v, outcome=outcome, points=0.0) for v in graded.verdicts)
        )


class Broken(Cheap):
    """With CHEAP_BROKEN the grader fails on the first exercise."""

    def grade(self, task: Task, data: bytes) -> Graded:
        """As Cheap does, but for that one."""
        import dataclasses

        graded = super().grade(task, data)
        if not os.environ.get("CHEAP_BROKEN"):
            return graded
        failed = dataclasses.replace(graded.verdicts[0], outcome="grader error", points=0.0, reason="the disk was full")
        return dataclasses.replace(graded, status="grader error", verdicts=(failed, *graded.verdicts[1:]))


class Raising(Cheap):
    """Every exercise has stopped with an error in a line that may be the submission's own."""

    def grade(self, task: Task, data: bytes) -> Graded:
        """As Cheap does, with other outcomes."""
        import dataclasses

        from condiff_check.grading.results import FactResult

        graded = super().grade(task, data)
        facts = (FactResult("a fact", "raises", "NameError: own_line\n  at line 2 of f:  own_line()"),)
        verdicts = (dataclasses.replace(one, outcome="raised", points=0.0, facts=facts) for one in graded.verdicts)
        return dataclasses.replace(graded, verdicts=tuple(verdicts))

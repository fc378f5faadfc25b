"""All attacks: those tried here, those that other tests try, and those that nothing can stop."""

import attacks_escape
import attacks_in_process
import attacks_protocol
import attacks_unlisted
from attacks_common import Attack

ATTACKS: tuple[Attack, ...] = (
    *attacks_in_process.RECORDS,
    *attacks_escape.RECORDS,
    *attacks_protocol.RECORDS,
    *attacks_unlisted.RECORDS,
)

# Attacks by files, frames, folders and reports: no notebook makes them.
COVERED_ELSEWHERE = {
    "53": "tests/test_grading_wire.py",
    "54": "tests/test_grading_wire.py",
    "55": "tests/test_grading_wire.py",
    "56": "tests/test_grading_wire.py",
    "62": "tests/test_grading_intake.py",
    "63": "tests/test_grading_intake.py",
    "64": "tests/test_grading_intake.py",
    "65": "tests/test_grading_intake.py",
    "66": "tests/test_grading_intake.py",
    "67": "tests/test_grading_reports.py",
    "68": "tests/test_grading_reports.py",
    "69": "tests/test_grading_intake.py",
    "70": "tests/test_grading_intake.py",
    "71": "tests/test_grading_intake.py",
    "74": "tests/test_grading_batch.py",
    "75": "tests/test_grading_batch.py",
}
UNANSWERED = {
    "7": "no attack: parameters, graphs, views and strides are right answers (variations_answers.py, entry 4)",
    "12": "no attack: the order in memory is nobody's business (variations_answers.py, entry 4)",
    "33": "time and load tell two submissions of one another; nothing of worth goes that way, and nothing stops it",
    "73": "a matter of rules, not of code: what a student is told names properties and never inputs, which come from a "
    "secret that can be changed; how often one may submit is for the course to say",
}

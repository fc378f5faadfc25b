"""condiff_check: right answers pass, wrong ones are named, and nothing that an answer does harms the notebook."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from torch import Generator, Tensor

from condiff_check import check, reveal
from condiff_check.checking import examine
from condiff_check.kill_matrix import written_again
from condiff_check.registry import exercises, find, lesson
from condiff_check.relations import relation
from condiff_check.report import NOT_DONE, RIGHT, WRONG, Report
from condiff_check.xray import Formula, ddpm_probes, read
from condiff_ref.shapes import pad


def right(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return pad(abar[t].sqrt(), x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps


def no_root(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return pad(abar[t], x0) * x0 + pad((1 - abar[t]).sqrt(), x0) * eps


def look(function: object, **how: int) -> Report:
    return examine(find("01.2"), (function,), seed=3, **how)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_right_answer_comes_back_itself(capsys: pytest.CaptureFixture):
    assert check("01.2", right) is right
    assert "01.2 q_sample: right" in capsys.readouterr().out


def test_a_wrong_answer_is_replaced_by_the_reference_and_told_so(capsys: pytest.CaptureFixture):
    lent = check("01.2", no_root)
    x = torch.ones(2, 1).double()
    abar, t = torch.tensor([1.0, 0.64]).double(), torch.tensor([0, 1])
    assert torch.allclose(lent(x, t, 0 * x, abar)[:, 0], torch.tensor([1, 0.8]).double())
    out = capsys.readouterr().out
    assert "not right yet" in out and "reference answer" in out


def test_several_functions_come_back_as_many(capsys: pytest.CaptureFixture):
    first, second = written_again(find("01.3").references)
    assert check("01.3", first, second) == (first, second)


def stub(*_: object) -> Tensor:
    raise NotImplementedError


def test_a_stub_is_not_done_yet_exactly_once(capsys: pytest.CaptureFixture):
    check("01.2", stub)
    assert capsys.readouterr().out.count("not done yet") == 1


def test_what_torch_does_not_implement_is_an_error_and_no_stub():
    def unfinished(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        raise NotImplementedError('"sqrt" not implemented for Int')

    assert look(unfinished).status == WRONG


def test_the_lent_reference_is_not_taken_for_an_answer(capsys: pytest.CaptureFixture):
    lent = check("01.2", no_root)
    check("01.2", lent)
    assert capsys.readouterr().out.count("q_sample: right") == 0


def test_unknown_exercises_and_wrong_counts_say_what_to_type():
    with pytest.raises(KeyError, match=r"no exercise '01.77': there are 01.1"):
        check("01.77", right)
    with pytest.raises(TypeError, match=r'check\("01.3", cond_score, score_from_eps\)'):
        check("01.3", right)
    with pytest.raises(ValueError, match="hint is 1, 2 or 3"):
        check("01.2", right, hint=4)


def test_a_wrong_answer_stops_nbgrader(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(AssertionError, match="not right yet"):
        check("01.2", no_root)
    assert check("01.2", right) is right


# --- what it says ----------------------------------------------------------------------------------------------------


def test_it_prints_the_formula_that_was_implemented():
    report = look(no_root)
    assert report.formulas == ("xt = abar[t]*x0 + sqrt(1 - abar[t])*eps",)
    assert report.diagnosis == next(m.diagnosis for m in find("01.2").mistakes if m.name == "no root on abar")


def test_hints_come_in_steps():
    where, answer = find("01.2").hints
    texts = [str(look(no_root, hint=hint)) for hint in (1, 2, 3)]
    assert [where in text for text in texts] == [False, True, True]
    assert [answer in text for text in texts] == [False, False, True]
    assert ["sqrt(abar[t])*x0 + sqrt(1 - abar[t])*eps" in text for text in texts] == [False, False, True]


def test_a_stub_gets_hints_too():
    texts = [str(look(stub, hint=hint)) for hint in (1, 2, 3)]
    assert [find("01.2").hints[1] in text for text in texts] == [False, False, True]


def test_html_says_the_same_and_escapes_it():
    def prints(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        print("<script>alert(1)</script>")
        return no_root(x0, t, eps, abar)

    html = look(prints)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "xt = abar[t]*x0 + sqrt(1 - abar[t])*eps" in html


def test_a_seed_repeats_the_inputs():
    seen = []

    def spy(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        seen.append(float(x0.flatten()[0]))
        return right(x0, t, eps, abar)

    examine(find("01.2"), (spy,), seed=11)
    half = len(seen)
    examine(find("01.2"), (spy,), seed=11)
    assert seen[:half] == seen[half:]
    examine(find("01.2"), (spy,), seed=12)
    assert seen[2 * half] != seen[0]


# --- bad answers -----------------------------------------------------------------------------------------------------


def raises(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return x0 + [1, 2][t[0]]


def leaves(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    sys.exit(0)


def prints_pages(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    for i in range(5000):
        print("page", i)
    return no_root(x0, t, eps, abar)


BAD = {
    "raises": (raises, "IndexError: list index out of range"),
    "exits": (leaves, "exit"),
    "None": (lambda x0, t, eps, abar: None, "returned None: is there a return statement?"),
    "a number": (lambda x0, t, eps, abar: 3.0, "should return a tensor, and returned float"),
    "wrong shape": (lambda x0, t, eps, abar: right(x0, t, eps, abar)[:, :1], "has shape (4, 1, 2, 5)"),
    "wrong dtype": (lambda x0, t, eps, abar: right(x0, t, eps, abar).float(), "keeps the dtype"),
    "integers": (lambda x0, t, eps, abar: right(x0, t, eps, abar).long(), "torch.int64"),
    "NaN": (lambda x0, t, eps, abar: right(x0, t, eps, abar).log(), "NaN or infinite"),
    "changes x0": (lambda x0, t, eps, abar: x0.copy_(right(x0, t, eps, abar)), "changed x0 in place"),
    "changes abar": (lambda x0, t, eps, abar: right(x0, t, eps, abar.clamp_(max=1).mul_(0.9)), "changed abar in place"),
    "prints": (prints_pages, "more characters"),
    "wants another argument": (lambda x0, t, eps: x0, "TypeError"),
    "is a tensor": (torch.ones(3), "of type Tensor: hand over the function itself, uncalled"),
    "is a name": ("q_sample", "without quotes"),
    "is a class": (dict, "TypeError"),
    "leaves a graph": (lambda x0, t, eps, abar: right(x0.requires_grad_(), t, eps, abar), "graph"),
}


@pytest.mark.parametrize(("function", "message"), BAD.values(), ids=BAD)
def test_bad_answers_are_refused_with_a_reason(function: object, message: str):
    report = look(function)
    assert report.status == WRONG
    assert message in str(report)
    assert "Traceback" not in str(report)
    assert len(str(report).splitlines()) < 40


def test_an_error_is_shown_at_the_learners_own_line():
    assert "return x0 + [1, 2][t[0]]" in str(look(raises))


def test_an_error_inside_the_course_is_shown_where_the_learner_called_it():
    def calls_badly(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        return pad(abar[t], 3) * x0

    assert "return pad(abar[t], 3) * x0" in str(look(calls_badly))


def test_an_endless_loop_is_stopped(monkeypatch: pytest.MonkeyPatch):
    def forever(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    exercise = find("01.2")
    object.__setattr__(exercise, "seconds", 0.5)
    try:
        start = time.monotonic()
        report = look(forever)
        assert time.monotonic() - start < 5
    finally:
        object.__setattr__(exercise, "seconds", 20.0)
    assert report.status == WRONG and "needs more than" in str(report)


def test_a_timer_that_was_running_runs_on():
    before = signal.setitimer(signal.ITIMER_REAL, 200)
    try:
        look(right)
        assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 200
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_the_keyboard_still_interrupts():
    def interrupted(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(interrupted)


def test_global_state_is_put_back():
    def careless(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        return right(x0, t, eps, abar)

    state = torch.get_rng_state()
    look(careless)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_too_odd_to_be_explained_is_still_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fails(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("condiff_check.checking.explain", fails)
    check("01.2", no_root)
    assert "not right yet" in capsys.readouterr().out


def test_a_slow_answer_is_not_run_for_minutes():
    def slow(x0: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        time.sleep(0.02)
        return no_root(x0, t, eps, abar)

    start = time.monotonic()
    assert look(slow).formulas
    assert time.monotonic() - start < 10


def test_prints_are_kept_apart(capsys: pytest.CaptureFixture):
    look(prints_pages)
    assert capsys.readouterr().out == ""


# --- the x-ray and the relations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x, e, t, abar: abar[t][:, None, None, None] ** 2 * x, "y = abar[t]**2*x"),
        (lambda x, e, t, abar: 0 * x, "y = 0"),
        (lambda x, e, t, abar: x - e, "y = x - eps"),
        (lambda x, e, t, abar: 2 * x + (1 - abar[t - 1])[:, None, None, None] * e, "y = 2*x + (1 - abar[t-1])*eps"),
        (lambda x, e, t, abar: (1 - abar[t].sqrt())[:, None, None, None] * e, "y = (1 - sqrt(abar[t]))*eps"),
    ],
)
def test_the_xray_reads_formulas(function: object, text: str):
    formula = Formula("f", "y", ("x", "eps"), "", ddpm_probes)
    reading = read(formula, function, ("x", "eps", "t", "abar"), Generator().manual_seed(1))
    assert reading.told and str(reading) == text


def test_the_xray_sees_what_is_not_linear():
    formula = Formula("f", "y", ("x",), "", ddpm_probes)
    reading = read(formula, lambda x, t, abar: x**2, ("x", "t", "abar"), Generator().manual_seed(1))
    assert not reading.told


def relations() -> dict:
    return {
        "opposite sign": lambda y: -y,
        "3 times too large, which is the length of axis 1 of x": lambda y: 3 * y,
        "12 times too small, which is the number of entries of x": lambda y: y / 12,
        "square root missing": lambda y: y**2,
        "off by the same number everywhere: +1.83788, which is log(2 pi)": lambda y: y + 1.8378770664093453,
        "summed over axis 1": lambda y: y.sum(1),
        "averaged over all axes": lambda y: y.mean(),
        "reverse order along axis 0": lambda y: y.flip(0),
        "cut to [0, 1]": lambda y: y.clamp(0, 1),
        "only index 2 is wrong": lambda y: torch.cat([y[:2], 7 + y[2:3] ** 2, y[3:]]),
        "only indices 2, 3 are wrong": lambda y: torch.cat([y[:2], 7 + y[2:] ** 2]),
    }


@pytest.mark.parametrize("words", relations())
def test_relations_are_found(words: str):
    found = relation([({"x": y}, relations()[words](y), y) for y in torch.randn(3, 4, 3).double()])
    assert found is not None and words in found


def test_no_relation_is_invented():
    y = torch.randn(3, 4, 3).double()
    assert relation([({"x": one}, torch.sin(3 * one) + one.roll(1, 0), one) for one in y]) is None
    assert "times the right one" not in (relation([({"x": one}, one * (1 + 3e-6), one) for one in y]) or "")


# --- the exercises on file -------------------------------------------------------------------------------------------


def test_where_many_answers_are_right_none_is_compared_with_the_reference():
    """10.10 wants a rule of the learner's own: one that is twice the reference is wrong, and not for that."""
    (reference,) = find("10.10").references
    report = examine(find("10.10"), (lambda *inputs: 2 * reference(*inputs),), seed=0)
    assert report.status == WRONG
    assert report.relation is None


def test_ids_are_numbered_within_their_lessons():
    for number in {exercise.id[:2] for exercise in exercises()}:
        assert [e.id for e in lesson(number)] == [f"{number}.{k}" for k in range(1, len(lesson(number)) + 1)]


@pytest.mark.parametrize("exercise", exercises(), ids=lambda e: e.id)
def test_every_exercise_has_mistakes_alternatives_and_documented_references(exercise):
    assert len(exercise.mistakes) >= 4 and len(exercise.alternatives) >= 2 and len(exercise.facts) >= 2
    assert len({m.diagnosis for m in exercise.mistakes}) == len(exercise.mistakes)
    assert all(reference.__doc__ for reference in exercise.references)
    assert [reference.__name__ for reference in exercise.references] == list(exercise.names)


def test_what_an_exercise_hides_exists():
    for exercise in exercises():
        for name in exercise.hides:
            module, *parts = name.split(".")
            thing = sys.modules.get(f"condiff_ref.{module}") or __import__(f"condiff_ref.{module}", fromlist=["_"])
            for part in parts:
                thing = getattr(thing, part)


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "said"),
    [(..., "No guess yet"), (47, "You said 47 %. Measured: 2 %. Why?"), (2, "Well seen"), ("about 2 %", "Well seen")],
)
def test_a_guess_stands_beside_what_was_measured(guess: object, said: str, capsys: pytest.CaptureFixture):
    reveal(guess, 2, " %")
    assert said in capsys.readouterr().out


def test_the_module_shows_what_a_check_says():
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "condiff_check", *words], capture_output=True, text=True)

    assert "You implemented: xt = abar[t]*x0" in run().stdout
    assert "00.1 gmm_logp: not right yet" in run("00.1").stdout
    unknown = run("99.9")
    assert unknown.returncode == 1 and "there is no exercise '99.9'" in unknown.stderr


def test_importing_costs_little():
    code = "import sys, condiff_check; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.split(".")[0] for name in out.split()}
    assert not loaded & {"matplotlib", "sklearn", "scipy", "IPython", "torchvision"}


def test_verdicts_do_not_depend_on_the_generator_state():
    assert {look(right).status for _ in range(3)} == {RIGHT}
    assert look(stub).status == NOT_DONE

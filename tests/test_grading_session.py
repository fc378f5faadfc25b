"""Facts judge code in another process as they judge it here: the same states, words and diagnoses."""

import contextlib
import os
import socket
import traceback
from collections.abc import Iterator, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Generator, Tensor, nn

from condiff_check import checking
from condiff_check.agent.child import ChildPeer
from condiff_check.agent.runner import ROOT
from condiff_check.agent.wire import Ended, Late, TooMany, Violation, Wire, WireError
from condiff_check.exercise import Exercise
from condiff_check.grading.session import Session
from condiff_check.guard import Failed
from condiff_check.registry import exercises, find

EXERCISES = {exercise.id: exercise for exercise in exercises()}


@contextlib.contextmanager
def far(*objects: object, calls: int = 20_000, seconds: float = 60.0) -> Iterator[tuple[Session, list]]:
    """The objects in a process of their own, and what stands for them here."""
    mine, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            mine.close()
            peer = ChildPeer(Wire(theirs))
            peer.show(ROOT, lambda name, back: objects[int(name)])
            peer.serve()
        except Ended:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    theirs.close()
    session = Session(mine, seconds, calls)
    try:
        yield session, session.objects([str(i) for i in range(len(objects))])
    finally:
        session.peer.wire.close()
        os.waitpid(pid, 0)


def examined(exercise: Exercise, objects: Sequence[object], seed: int) -> checking.Report:
    with far(*objects) as (session, proxies):
        report = checking.judge(exercise, proxies, seed=seed, guarded=session.guard)
        assert session.ended is None
        return checking.explain(report, proxies, guarded=session.guard)


def told(report: checking.Report) -> tuple:
    # without the line that raised: it is the learner's own, and these answers are the course's
    facts = [(one.fact.name, one.state, one.message.partition("\n  at line")[0]) for one in report.results]
    return report.status, facts, report.formulas, report.diagnosis, report.relation


@pytest.mark.parametrize("id", EXERCISES)
def test_a_right_answer_is_right_across_the_boundary(id):
    report = examined(EXERCISES[id], EXERCISES[id].alternatives[0], seed=5)
    assert report.status == "right", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("id", EXERCISES)
def test_all_right_answers_are_right_across_the_boundary(id):
    for objects in (EXERCISES[id].references, *EXERCISES[id].alternatives[1:]):
        report = examined(EXERCISES[id], objects, seed=5)
        assert report.status == "right", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("id", EXERCISES)
def test_mistakes_are_told_in_the_same_words_across_the_boundary(id):
    exercise = EXERCISES[id]
    for mistake in exercise.mistakes[:3]:
        assert told(examined(exercise, mistake.answers, 5)) == told(checking.examine(exercise, mistake.answers, seed=5))


# --- what crosses, and how --------------------------------------------------------------------------------------------


def test_plain_values_come_back_as_they_went():
    values = [None, True, -7, 2**200, 0.1, float("inf"), "ä\n", [1, (2, [3.5])], {"a": (None,), 3: "b"}, torch.float32]
    values += [slice(1, None, 2), ...]
    with far(lambda *args: list(args)) as (_, (echo,)):
        assert echo(*values) == values
        assert torch.isnan(torch.tensor(echo(float("nan"))[0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "uint8", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_tensors_come_back_to_the_last_bit(dtype, shape):
    tensor = (10 * torch.randn(shape)).to(getattr(torch, dtype))
    with far(lambda x: x) as (_, (echo,)):
        back = echo(tensor)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(6.0).reshape(2, 3).T,
        lambda: torch.ones(1).expand(4),
        lambda: torch.ones(3, 1).expand(3, 5),
        lambda: torch.tensor([1 + 2j]).conj().imag,
        lambda: nn.Parameter(torch.arange(3.0)),
        lambda: torch.arange(10.0)[::3],
    ],
    ids=["transposed", "one number", "expanded", "negated view", "parameter", "strided"],
)
def test_any_dense_view_is_a_tensor_like_another(make):
    with far(make) as (_, (function,)):
        assert torch.equal(function().detach(), make().detach())


@pytest.mark.parametrize(
    "make",
    [lambda: torch.eye(3).to_sparse(), lambda: torch.empty(2, device="meta"), lambda: torch.tensor([1j]), lambda: {1}],
    ids=["sparse", "meta", "complex", "set"],
)
def test_what_is_no_dense_real_tensor_is_none_here_either(make):
    with far(make) as (_, (function,)):
        assert not isinstance(function(), Tensor | nn.Module | list | tuple | dict)


def test_a_generator_is_drawn_from_as_if_it_were_here():
    here, there = Generator().manual_seed(3), Generator().manual_seed(3)
    due = [torch.randn(2, generator=here) for _ in range(2)]
    with far(lambda g: torch.randn(2, generator=g)) as (_, (draw,)):
        got = [draw(there), torch.randn(2, generator=there)]
    assert all(torch.equal(a, b) for a, b in zip(due, got, strict=True))


def test_arguments_that_a_call_changes_are_changed_here():
    def change(x: Tensor, y: Tensor) -> None:
        x.mul_(2)
        y.requires_grad_()
        (y**2).sum().backward()

    x, y = torch.ones(2, 2), torch.tensor([3.0])
    with far(change) as (_, (function,)):
        function(x, y)
    assert torch.equal(x, 2 * torch.ones(2, 2))
    assert y.requires_grad and y.grad.item() == 6


def test_gradients_pass_through_a_call_and_its_own_gradient_too():
    x = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    with far(torch.sin) as (_, (sine,)):
        (slope,) = torch.autograd.grad(sine(x).sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x)
        torch.testing.assert_close(slope, x.cos())
        torch.testing.assert_close(curve, -x.sin())
        assert torch.autograd.gradcheck(sine, (x,))


def test_gradients_pass_through_a_model_that_is_called_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    spied = nn.Module()
    spied.inner, spied.calls = model, 0

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    spy, x = Spy(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with far(lambda net, x: (net(2 * x) ** 2).sum()) as (_, (loss_of,)):
        loss = loss_of(spy, x)
        loss.backward()
    mine = x.detach().clone().requires_grad_()
    weights = [p.grad.clone() for p in spy.parameters()]
    spy.zero_grad()
    due = (model(2 * mine) ** 2).sum()
    due.backward()
    assert spy.calls == 1
    torch.testing.assert_close(loss.detach(), due.detach())
    torch.testing.assert_close(x.grad, mine.grad)
    torch.testing.assert_close(weights, [p.grad for p in spy.parameters()])


def test_a_training_step_over_there_is_the_same_as_one_here():
    def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
        loss = (net(x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    nets = [nn.Linear(3, 2)]
    nets.append(deepcopy(nets[0]))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    x = torch.randn(5, 3)
    with far(step) as (_, (there,)):
        for _ in range(3):
            assert step(nets[0], optimizers[0], x) == there(nets[1], optimizers[1], x)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(one.grad, two.grad)


def test_a_module_made_there_has_its_parameters_here():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * (1 if self.training else -1)

    with far(Net) as (_, (make,)):
        net = make()
        assert isinstance(net.lin, nn.Linear) and len(list(net.parameters())) == 2
        with torch.no_grad():
            net.lin.weight.copy_(torch.eye(2))
            net.lin.bias.zero_()
        x = torch.tensor([[1.0, 2.0]])
        assert torch.equal(net(x).detach(), x)
        assert torch.equal(net.eval()(x).detach(), -x)
        net(x).sum().backward()
        assert torch.equal(net.lin.bias.grad, torch.tensor([-1.0, -1.0]))


def test_memory_that_two_modules_share_is_shared_here():
    def copies(net: nn.Module) -> tuple[nn.Module, nn.Module]:
        shared = nn.Linear(2, 2)
        shared.weight = net.weight
        return deepcopy(net), shared

    net = nn.Linear(2, 2)
    with far(copies) as (_, (function,)):
        own, shared = function(net)
        assert shared.weight is net.weight
        assert own.weight is not net.weight and torch.equal(own.weight, net.weight)


def test_an_object_that_is_handed_back_is_the_same_object():
    net, function = nn.Linear(1, 1), lambda x: x
    with far(lambda *args: args) as (_, (echo,)):
        assert echo(net, function) == (net, function)


def test_what_is_thrown_away_is_forgotten_on_both_sides():
    with far(lambda net, x: net(x)) as (session, (function,)):
        for _ in range(50):
            function(nn.Linear(2, 2), torch.zeros(1, 2))
        assert len(session.peer._exports) < 20


# --- errors, ends and bounds ------------------------------------------------------------------------------------------


def test_an_error_has_its_type_message_and_line():
    def wrong(x: Tensor) -> Tensor:
        raise ValueError("not like this")

    with far(wrong) as (session, (function,)):
        with pytest.raises(ValueError, match="not like this"):
            function(torch.zeros(1))
        with pytest.raises(Failed, match=r"(?s)ValueError: not like this.*at line \d+ of wrong:  raise ValueError"):
            session.guard(5)(function, torch.zeros(1))


def test_exit_is_an_error_of_the_answer():
    with far(lambda: exit(3)) as (session, (function,)):
        with pytest.raises(Failed, match="called exit"):
            session.guard(5)(function)
        assert session.ended is None


def test_the_end_of_the_process_ends_the_session():
    with far(lambda: os._exit(1)) as (session, (function,)):
        with pytest.raises(Failed, match="the process ended"):
            session.guard(5)(function)
        assert isinstance(session.ended, Ended)
        with pytest.raises(Ended):
            function()


def test_too_long_is_too_long():
    def forever() -> None:
        while True:
            pass

    with far(forever) as (session, (function,)):
        with pytest.raises(checking.OutOfTime):
            session.guard(0.2)(function)
        assert isinstance(session.ended, Late)
        os.kill(_child_of(session), 9)


def _child_of(session: Session) -> int:
    (pid,) = [int(pid) for pid in os.popen(f"ps -o pid= --ppid {os.getpid()}").read().split() if _is_fork(pid)][-1:]
    return pid


def _is_fork(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as mine, open("/proc/self/cmdline", "rb") as ours:
            return mine.read() == ours.read()
    except OSError:
        return False


def test_what_is_given_is_called_so_often_and_not_more():
    def greedy(f: object) -> None:
        while True:
            f(1)

    with far(greedy, calls=30) as (session, (function,)):
        with pytest.raises(Failed, match="more than 30 times"):
            session.guard(5)(function, lambda x: x)
        assert isinstance(session.ended, TooMany)


def test_a_tensor_that_is_too_large_is_refused_and_nothing_is_allocated():
    with far(lambda: torch.empty(1).expand(10**12)) as (_, (function,)), pytest.raises(Exception, match="too large"):
        function()


def test_the_judge_answers_nothing_but_calls_of_what_it_has_shown():
    mine, theirs = socket.socketpair()
    session = Session(mine, 5)
    child = Wire(theirs)
    for request in (
        dict(op="get", handle="J1", path="", name="secret"),
        dict(op="call", handle="J99", path="", value=["u", [["l", []], ["d", []]]]),
        dict(op="copy", handle=["J1"], path=""),
        dict(op="back", of=None, value=7),
        dict(op="reply", value=["h", "J1", ""]),
        dict(op="reply", value=["h", "J1", "__class__"], new=7),
        dict(op="reply", value=["t", "float32", [2**62, 2**62], 0, False]),
        dict(op="reply", value=["t", "float32", [-1], 0, False]),
        dict(op="reply", value=["t", "object", [1], 0, False]),
        dict(op="reply", value=["t", "float32", [3], 0, True], tape="C1", leaves=[["argument", 99]]),
        dict(op="reply", value=["n"], new=[["J5", dict(kind="function", name="f")]]),
        dict(op="reply", value=["n"], new=[["C5", dict(kind="module", tree=dict(type="x"))]]),
        dict(op="reply", value=["n"], after=dict(tensors=[[5, None, None, True]], generators=[])),
    ):
        session.peer.ended = None
        child.send(request)
        with pytest.raises((Violation, WireError)):
            session.peer.call(ROOT, "", ["f", 0])
        child.receive()


def test_the_rows_of_this_test_are_all_exercises():
    assert len(EXERCISES) == 89 and find("04.1") is EXERCISES["04.1"]

"""What a hostile child can send: the judge neither believes, nor runs, nor keeps, nor waits for more than it may."""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from condiff_check import checking
from condiff_check.agent import peer, values
from condiff_check.agent.runner import ROOT
from condiff_check.agent.wire import LENGTHS, Late, Violation, Wire, WireError
from condiff_check.compare import close, oddity, plain
from condiff_check.exercise import Exercise
from condiff_check.grading.intake import Cell
from condiff_check.grading.judge import Judge, _definitions, _judged, _untouched
from condiff_check.grading.results import OUTCOMES
from condiff_check.grading.session import Session
from condiff_check.guard import Failed, NotDone, OutOfTime
from condiff_check.registry import find
from test_grading_session import far

CASES = int(os.environ.get("CONDIFF_CASES", "150"))
QUICK = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
NOTHING = dict(op="reply", value=["n"])


@contextmanager
def talk(seconds: float = 5.0, calls: int = 20_000) -> Iterator[tuple[Session, Wire]]:
    """A judge's session, and the end of the wire that a child has."""
    mine, theirs = socket.socketpair()
    for end in (mine, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    session, child = Session(mine, seconds, calls), Wire(theirs, lambda: time.monotonic() + 5)
    try:
        yield session, child
    finally:
        session.close()
        child.close()


def ask(session: Session, child: Wire, *messages: dict, body: bytes = b"", given: object = None) -> object:
    """What a call comes to if this is what the child says."""
    for message in messages:
        child.send(message, [body] if body else [])
    return session.peer.call(ROOT, "", [given] if given is not None else [])


def part(**more: object) -> dict:
    """A module as it is told."""
    told = dict(type="M", torch=None, native=False, attributes=[], training=True)
    return {**told, "parameters": [], "buffers": [], "children": [], **more}


def new(tree: dict, handle: str = "C1") -> dict:
    return dict(op="reply", value=["h", handle, ""], new=[[handle, dict(kind="module", tree=tree)]])


# --- time -------------------------------------------------------------------------------------------------------------


@contextmanager
def flooded(frame: bytes, wire: Callable[[socket.socket], Wire]) -> Iterator[Wire]:
    """A wire on which frames come so fast that it never waits."""
    mine, theirs = socket.socketpair()
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            try:
                theirs.sendall(frame * 1000)
            except OSError:
                return

    def drain() -> None:
        with suppress(OSError):
            while theirs.recv(1 << 16):
                pass

    threads = [threading.Thread(target=flood), threading.Thread(target=drain)]
    for thread in threads:
        thread.start()
    try:
        yield wire(mine)
    finally:
        done.set()
        mine.close()
        for thread in threads:
            thread.join()
        theirs.close()


def test_frames_without_a_pause_end_at_the_deadline():
    end, late = time.monotonic() + 0.3, False
    with flooded(LENGTHS.pack(2, 0) + b"{}", lambda mine: Wire(mine, lambda: end)) as wire:
        while not late and time.monotonic() < end + 2:
            try:
                wire.receive()
            except Late:
                late = True
    assert late


def test_calls_without_end_end_at_the_deadline():
    text = json.dumps(dict(op="back", of="J0", value=["l", []])).encode()
    start = time.monotonic()
    frame = LENGTHS.pack(len(text), 0) + text
    with flooded(frame, lambda mine: Session(mine, 0.3, 10**9)) as session, pytest.raises(WireError):
        session.peer.call(ROOT, "")
    assert time.monotonic() - start < 5


def test_a_module_that_shares_its_parts_in_powers_of_two_is_refused():
    tree = part(children=[["p0", part()]])
    tree["children"] += [
        [f"p{i}", part(children=[["a", dict(again=f"p{i - 1}")], ["b", dict(again=f"p{i - 1}")]])] for i in range(1, 60)
    ]
    with talk() as (session, child), pytest.raises(Violation):
        ask(session, child, new(tree))


def test_a_module_within_itself_is_refused():
    with talk() as (session, child), pytest.raises(Violation):
        ask(session, child, new(part(children=[["a", dict(again="")]])))


def test_a_module_of_many_borrowed_parameters_is_refused_soon():
    net = nn.Module()
    for i in range(900):
        net.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1)))
    borrowed = [[f"q{i}", dict(like=["J1", "p0"], data=True, grad=False)] for i in range(15_000)]
    with talk() as (session, child):
        start = time.monotonic()
        with pytest.raises(Violation):
            ask(session, child, new(part(parameters=borrowed)), given=net)
        assert time.monotonic() - start < 2


def test_handles_are_dropped_by_the_hundred_thousand_soon():
    with talk(seconds=30) as (session, child):
        things = [dict(kind="function", name="f")] * 5000
        ask(session, child, NOTHING | dict(new=[[f"C{i}", told] for i, told in enumerate(things)]))
        start = time.monotonic()
        ask(session, child, NOTHING | dict(drop=[f"J{i}" for i in range(100_000)]))
        ask(session, child, NOTHING)
        assert time.monotonic() - start < 2


def test_gradients_of_gradients_of_gradients_have_an_end():
    def model(x: Tensor) -> Tensor:
        return x.sin()

    def climb(f: Callable, x: Tensor) -> None:
        x = x.clone().requires_grad_()
        slope = f(x).sum()
        for _ in range(50):
            (slope,) = torch.autograd.grad(slope.sum(), x, create_graph=True)

    with far(climb) as (session, (function,)), pytest.raises(Exception, match="order"):
        session.guard(20)(function, model, torch.ones(2))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_no_byte_of_a_message_becomes_two_tensors():
    same = ["l", [["t", "uint8", [1 << 20], 0, False]] * 200]
    with talk() as (session, child), pytest.raises(Violation):
        ask(session, child, dict(op="reply", value=same), body=bytes(1 << 20))


def test_what_is_sent_in_all_is_bounded(monkeypatch):
    monkeypatch.setattr(peer, "TRAFFIC", 1 << 20)
    with talk() as (session, child):
        ask(session, child, NOTHING, body=bytes(600_000))
        with pytest.raises(Violation, match="in all"):
            ask(session, child, NOTHING, body=bytes(600_000))


def test_a_judge_takes_no_large_message():
    with talk() as (session, child):
        child._socket.send(LENGTHS.pack(2, 60 << 20) + b"{}")
        with pytest.raises(Violation, match="announces"):
            session.peer.call(ROOT, "")


def test_copies_of_a_judges_module_have_an_end():
    def hoard(net: nn.Module) -> int:
        kept = []
        for _ in range(1000):
            kept.append(net._peer.copy(net._handle, ""))
        return len(kept)

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with far(hoard) as (session, (function,)):
        with pytest.raises(Failed, match="copies"):
            session.guard(20)(function, Spy())
        assert len(session.peer._exports) < 50


def test_what_has_not_changed_is_not_sent_again_though_it_is_not_a_number():
    net = nn.Linear(100, 100)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    with far(lambda net: None) as (session, (function,)):
        function(net)
        before = session.peer._traffic
        function(net)
        assert session.peer._traffic - before < 1000


def test_what_is_not_a_number_is_not_a_changed_argument():
    x = torch.full((3,), float("nan"))
    with far(lambda x: None) as (session, (function,)):
        function(x)
        assert session.peer.altered == set()


# --- what was not shown -----------------------------------------------------------------------------------------------


class Spy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.looked = 0
        self.inner = nn.Linear(1, 1)

    @property
    def answer(self) -> nn.Module:
        self.looked += 1
        return nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("path", ["answer", "inner.answer", "forward", "__class__", "inner.weight", ".", "inner."])
def test_a_path_leads_to_parts_of_a_module_only(path):
    spy = Spy()
    with talk() as (session, child):
        with pytest.raises(Violation):
            ask(session, child, dict(op="call", handle="J1", path=path, value=["u", [["l", []], ["d", []]]]), given=spy)
        assert spy.looked == 0
    with talk() as (session, child):
        with pytest.raises(Violation):
            ask(session, child, dict(op="reply", value=["h", "J1", path]), given=spy)
        assert spy.looked == 0


def test_a_path_into_a_stand_in_asks_the_child_for_nothing():
    with talk() as (session, child):
        ask(session, child, new(part()))
        child.receive()
        with pytest.raises(Violation):
            ask(session, child, dict(op="reply", value=["h", "C1", "foo"]))
        assert child.receive()[0]["op"] == "call"
        with pytest.raises(Late):
            Wire(child._socket, lambda: time.monotonic() - 1).receive()


@pytest.mark.parametrize("op", ["get", "serve", "exec", None, 3, ["call"]])
def test_a_judge_answers_no_other_request(op):
    with talk() as (session, child), pytest.raises(Violation):
        ask(session, child, dict(op=op, handle="J1", path="", name="inner"), given=Spy())


@pytest.mark.parametrize(
    "name", ["forward", "__class__", "_peer", "_handle", "_path", "_modules", "state_dict", "train", "__dict__", "to"]
)
def test_a_stand_in_keeps_its_ways_whatever_its_attributes_are_called(name):
    tree = part(attributes=[[name, ["s", "mine"]]], torch="Linear")
    with talk() as (session, child):
        made = ask(session, child, new(tree))
        assert type(made).forward is peer.modules.RemoteModule.forward
        assert getattr(made, name) != "mine"


def test_names_of_what_the_judge_hands_over_tell_nothing():
    def wrong_sign(x: Tensor) -> Tensor:
        return -x

    with far(lambda f: [f.__name__, repr(f), f.__qualname__]) as (_, (function,)):
        assert "wrong" not in str(function(wrong_sign))


def test_a_state_that_makes_torch_read_beyond_its_table_is_refused():
    generator = Generator().manual_seed(1)
    state = bytearray(generator.get_state().numpy().tobytes())
    struct.pack_into("<QiiQ", state, 0, 1, 600, 1, 623)
    message = dict(op="reply", value=["n"], after=dict(tensors=[], generators=[[0, 0]]))
    with talk() as (session, child), pytest.raises(Violation):
        ask(session, child, message, body=bytes(state), given=generator)


@pytest.mark.parametrize("draws", [0, 1, 623, 624, 625, 2000])
def test_a_state_that_a_generator_can_have_is_taken(draws):
    generator, due = Generator().manual_seed(1), Generator().manual_seed(1)
    with far(lambda g, n: torch.rand(n, generator=g)) as (_, (function,)):
        function(generator, draws)
    torch.rand(draws, generator=due)
    assert torch.equal(torch.rand(700, generator=generator), torch.rand(700, generator=due))


def test_a_truth_value_is_true_or_false():
    with talk() as (session, child):
        found = ask(session, child, dict(op="reply", value=["t", "bool", [3], 0, False]), body=b"\0\2\377")
    assert found.view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize("place", [-1, True, 0.0, "0", 10**30, None, [0]])
@pytest.mark.parametrize("kind", ["a", "o"])
def test_a_place_in_a_list_is_counted_from_its_start(kind, place):
    tensor = ["t", "float32", [1], 0, False]
    with talk() as (session, child), pytest.raises(Violation):
        ask(session, child, dict(op="reply", value=["l", [tensor, [kind, place]]]), body=bytes(4), given=torch.ones(2))


# --- a right answer is right by its results ---------------------------------------------------------------------------


def test_an_answer_is_not_right_because_it_changed_what_it_is_compared_with():
    exercise = find("01.2")
    right = exercise.references[0]
    calls = [0]

    def forged(*args: object) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            for value in args:
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.mul_(1.0 + 1e-3)
        return right(*args)

    with far(forged) as (session, proxies):
        report = checking.judge(exercise, proxies, seed=5, guarded=session.guard)
        assert session.ended is None and session.peer.altered == {"an argument"}
        report = _untouched(report, session)
    assert report.status == "wrong"


@pytest.mark.parametrize("deed", ["parameter", "buffer", "argument", "gradient", "mode", "requires_grad", "shared"])
def test_what_a_child_changes_is_told_and_put_back(deed):
    def change(net: nn.Module, x: Tensor) -> nn.Module | None:
        shared = nn.Linear(1, 1)
        match deed:
            case "parameter":
                net.weight.data.zero_()
            case "buffer":
                net.running_mean.fill_(3)
            case "argument":
                x.zero_()
            case "gradient":
                net.weight.grad = torch.ones_like(net.weight)
            case "mode":
                net.eval()
            case "requires_grad":
                net.weight.requires_grad_(False)
            case "shared":
                shared.weight = nn.Parameter(net.weight.data)
                shared.weight.data.zero_()
                return shared
        return None

    net, x = nn.BatchNorm1d(3), torch.ones(2, 3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with far(change) as (session, (function,)):
        made = function(net, x)
        if deed == "shared":
            function(made, x)
        assert session.peer.altered
        session.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(x, torch.ones(2, 3)) and net.training
    assert net.weight.grad is None and net.weight.requires_grad


@pytest.mark.parametrize("id", ["00.5", "03.8"])
@pytest.mark.parametrize("trick", ["count", "identity", "name"])
def test_a_test_that_knows_its_functions_from_outside_is_not_right(id, trick):
    rights = ("q_sample", "_in_place", "guided_eps", "_guided_loop", "_guided_via_score")

    def attempt(guess: int) -> str:
        seen: list[Callable] = []

        def forged(function: Callable) -> None:
            seen.append(function)
            match trick:
                case "count":  # the right ones are tried three times before any wrong one
                    assert len(seen) <= guess
                case "identity":
                    assert any(function is known for known in seen[:guess])
                case "name":
                    assert function.__name__ in rights or (function.__name__ == "<lambda>" and len(seen) <= guess)

        return checking.judge(find(id), [forged], seed=5).status

    assert "right" not in {attempt(guess) for guess in range(2, 16)}


def test_a_mode_that_is_put_back_within_the_call_is_no_change():
    def look(net: nn.Module, x: Tensor) -> Tensor:
        net.eval()
        out = net(x)
        net.train()
        return out

    with far(look) as (session, (function,)):
        function(nn.Dropout(0.5), torch.ones(2))
        assert session.peer.altered == set()


# --- every end is a verdict -------------------------------------------------------------------------------------------


class Attempt:
    """The run of a notebook whose child says this, and no more."""

    def __init__(self, *messages: dict):
        self.messages = messages

    def session(self, exercise: Exercise) -> Session:
        mine, theirs = socket.socketpair()
        child = Wire(theirs)
        for message in self.messages:
            child.send(message)
        theirs.shutdown(socket.SHUT_WR)
        return Session(mine, 2)

    def after(self, session: Session | None) -> str | None:
        return "protocol" if session is not None and session.ended is not None else None


@pytest.mark.parametrize(
    "message",
    [
        dict(op="reply", error=dict(type="KeyError", module="builtins", text="q_sample", told="KeyError")),
        dict(op="reply", error=dict(type="ExceptionGroup", module="builtins", text="", told="")),
        dict(op="reply", error=dict(type="StopIteration", module="builtins", text="", told="")),
        dict(op="reply", error=[]),
        dict(op="reply", error="x"),
        dict(op="reply"),
        dict(op="reply", value=["n"], tape=3, leaves=7),
        dict(op="reply", value=["h", "J1", "x"]),
        dict(op="reply", value=["n"], after=7),
        dict(op="reply", value=["n"]),
    ],
    ids=lambda message: json.dumps(message)[:40],
)
def test_whatever_stands_for_a_definition_there_is_a_verdict(message):
    exercise = find("01.2")
    judge = Judge(None, b"secret")
    report, session, why = judge._try(Attempt(message), exercise, 0)
    verdict = _judged(exercise, report, session, why, (), 0.0, 0)
    assert verdict.points == 0 and verdict.outcome in OUTCOMES and verdict.outcome != "grader error"


def test_what_the_judge_cannot_handle_is_a_verdict_for_somebody_to_look_at():
    class Broken(Attempt):
        def session(self, exercise: Exercise) -> Session:
            raise OSError("no more descriptors")

    exercise = find("01.2")
    report, session, why = Judge(None, b"secret")._try(Broken(), exercise, 0)
    assert _judged(exercise, report, session, why, (), 0.0, 0).outcome == "grader error"


@pytest.mark.parametrize("told", [None, [], {"f": 7}, {"f": [1] * 6}, {"f": [True]}, {"f": [3]}, {"f": [10**399]}])
def test_definitions_stand_in_cells_that_were_run(told):
    cells = [Cell(1, "a", "", ()), Cell(2, "b", "", ())]
    assert _definitions({"f": [1, 2]}, ["f", "g"], cells) == {"f": [1, 2], "g": []}
    with pytest.raises(Violation):
        _definitions(told, ["f", "g"], cells)


# --- anything at all --------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    [
        "",
        "n",
        "call",
        "back",
        "reply",
        "J1",
        "J2",
        "J4",
        "C1",
        "0",
        "float32",
        "bool",
        "weight",
        "forward",
        "\ud800",
        "\0",
    ]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**63, -(2**70), 10**300]) | st.floats(allow_nan=False)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=5)
KINDS = st.sampled_from([*"nbifsyeluzdtarghxo", ""])
VALUES = st.recursive(
    st.tuples(KINDS, LEAVES).map(list)
    | st.tuples(
        st.just("t"), st.sampled_from(sorted(values.DTYPES)), st.lists(NUMBERS, max_size=3), NUMBERS, LEAVES
    ).map(list)
    | st.tuples(st.sampled_from("hg"), TEXTS, TEXTS | NUMBERS).map(list),
    lambda inner: (
        st.tuples(st.sampled_from("ludz"), st.lists(inner, max_size=4)).map(list) | st.lists(inner, max_size=4)
    ),
    max_leaves=12,
)
JSONS = st.recursive(
    LEAVES | VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
HEADERS = st.fixed_dictionaries(
    dict(op=st.sampled_from(["reply", "call", "back", "copy", "get"])),
    optional=dict(
        value=VALUES | JSONS,
        handle=TEXTS,
        path=TEXTS,
        of=TEXTS,
        tape=TEXTS,
        leaves=JSONS,
        after=st.fixed_dictionaries(dict(tensors=JSONS, generators=JSONS)) | JSONS,
        new=st.lists(st.tuples(TEXTS, JSONS).map(list), max_size=3) | JSONS,
        sync=st.lists(st.tuples(TEXTS, JSONS).map(list), max_size=3) | JSONS,
        optimizers=st.lists(st.tuples(TEXTS, JSONS).map(list), max_size=3) | JSONS,
        drop=st.lists(TEXTS, max_size=4) | JSONS,
        error=JSONS,
        watched=JSONS,
        grad=LEAVES,
        create=LEAVES,
        name=TEXTS,
    ),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(2, 2), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.inner(x)


def _everything() -> dict[str, object]:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    x = torch.ones(2, 2, requires_grad=True)
    return dict(net=net, optimizer=optimizer, generator=Generator(), function=torch.sin, x=x)


def _survives(messages: list[tuple[dict, bytes]]) -> None:
    """Whatever comes, a call has a result, a WireError, or an error that the child tells of; and soon."""
    with talk(seconds=2) as (session, child):
        for header, body in messages:
            try:
                child.send(header, [body])
            except (WireError, ValueError):  # no JSON, or more than fits
                return
        child._socket.shutdown(socket.SHUT_WR)
        things, odd = _everything(), None
        start = time.monotonic()
        for _ in range(2):
            try:
                found = session.peer.call(ROOT, "", [list(things.values())])
                _use(session, found)
            except WireError:
                odd = odd or (None if session.ended is not None else "a session that should have ended")
            except Exception as error:
                odd = odd or (None if hasattr(error, "told") else error)
        assert odd is None
        json.dumps(sorted(session.peer.altered))
    assert time.monotonic() - start < 5


def _use(session: Session, found: object) -> None:
    """As facts do."""
    with suppress(Failed, NotDone, OutOfTime):
        session.guard(1)(lambda: (plain(found), oddity(found, torch.ones(2)), close(plain(found), torch.ones(2))))
    if isinstance(found, nn.Module):
        with suppress(Failed, NotDone, OutOfTime):
            session.guard(1)(lambda: (list(found.parameters()), repr(found), found.state_dict(), found(torch.ones(2))))


@QUICK
@given(st.lists(st.tuples(HEADERS, st.binary(max_size=64)), min_size=1, max_size=3))
def test_whatever_a_child_says_a_call_ends_well(messages):
    _survives(messages)


@QUICK
@given(st.binary(max_size=200))
def test_whatever_bytes_come_a_call_ends_well(data):
    with talk(seconds=1) as (session, child):
        child._socket.send(data)
        child._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError):
            session.peer.call(ROOT, "")


class Odd(nn.Module):
    """A module of a submission, with all that there can be of parts."""

    def __init__(self, lent: nn.Module):
        super().__init__()
        self.convolution = nn.Conv1d(2, 2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.tied, self.again = lent.inner.weight, self.norm
        self.width, self.sizes = 3, [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x[..., None])[..., 0]


def _busy(things: list) -> object:
    net, optimizer, generator, function, x = things
    deepcopy(net)
    net.eval()
    torch.randn(2, generator=generator)
    loss = (function(net(x)) ** 2).mean()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.sum()).backward()
    optimizer.step()
    x.data.mul_(2)
    return [loss, {"net": Odd(net), 3: (net, x)}, torch.optim.SGD(net.parameters(), lr=0.1), lambda: 1, slice(1, 2)]


@pytest.fixture(scope="module")
def spoken() -> list[tuple[dict, bytes]]:
    """What an honest child says while it does all that it can."""
    said, mine = [], []
    with far(_busy) as (session, (function,)):
        receive = session.peer.wire.receive
        session.peer.wire.receive = lambda: said.append(receive()) or said[-1]
        mine.append(function(list(_everything().values())))
    return said


def _mutated(node: object, draw: Callable, left: list[int]) -> object:
    """A copy in which the parts at these places, counted from the top, are something else."""
    left[0] -= 1
    if left[0] == 0:
        return draw(LEAVES | VALUES | JSONS)
    if isinstance(node, dict):
        return {key: _mutated(item, draw, left) for key, item in node.items()}
    return [_mutated(item, draw, left) for item in node] if isinstance(node, list) else node


def _nodes(node: object) -> int:
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return 1 + sum(map(_nodes, inner))


@QUICK
@given(data=st.data())
def test_an_honest_conversation_with_one_word_changed_ends_well(spoken, data):
    at = data.draw(st.integers(0, len(spoken) - 1))
    header, body = spoken[at]
    for _ in range(data.draw(st.integers(1, 2))):
        header = _mutated(header, data.draw, [data.draw(st.integers(2, _nodes(header)))])
    if data.draw(st.integers(0, 5)) == 0:
        body = body[: data.draw(st.integers(0, len(body)))]
    _survives([*spoken[:at], (header, body), *spoken[at + 1 :]] if isinstance(header, dict) else [])


def test_the_honest_conversation_is_understood(spoken):
    assert {header["op"] for header, _ in spoken} == {"call", "back", "copy", "reply"}
    with talk() as (session, child):
        for header, body in spoken:
            child.send(header, [body])
        found = session.peer.call(ROOT, "", [list(_everything().values())])
    assert isinstance(found[1]["net"], nn.Module) and isinstance(found[2], torch.optim.SGD)

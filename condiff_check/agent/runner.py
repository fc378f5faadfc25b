"""In the child: run a notebook's cells, then answer the judge's calls of what they defined."""

import atexit
import contextlib
import gc
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import errors
from .child import ChildPeer
from .peer import Peer
from .wire import Wire, WireError

KEPT = 5  # definitions of one name
NOTE = 300  # characters
ROOT = "C0"  # the handle of the function that gives the definitions out


def main(control: socket.socket) -> None:
    """Follow the judge's orders until it hangs up."""
    runner = Runner(control)
    with contextlib.suppress(WireError):
        runner.listen()


class Runner:
    """Runs cells in one namespace, and keeps each callable that is bound to a name of an exercise."""

    def __init__(self, control: socket.socket):
        self._socket, self._wire = control, Wire(control)
        self._names: list[str] = []
        self._defined: dict[str, list[tuple[int, object]]] = {}
        self._serving: int | None = None
        self._pid = os.getpid()
        self._shell = _shell()

    def listen(self) -> None:
        while True:
            order, _ = self._wire.receive()
            if order["op"] == "run":
                self._names = order["names"]
                for cell in order["cells"]:
                    self._run(cell["number"], cell["source"])
                found = {name: [number for number, _ in kept] for name, kept in self._defined.items()}
                self._wire.send(dict(op="done", defined=found))
            elif order["op"] == "serve":
                self._serve()

    # --- cells

    def _run(self, number: int, source: str) -> None:
        """An error is told, and the next cell runs all the same."""
        self._wire.send(dict(op="running", number=number))
        note, there = "", _children()
        try:
            outcome = self._shell.run_cell(source, store_history=False)
            error = outcome.error_before_exec or outcome.error_in_exec
            note = errors.describe(error)[:NOTE] if error is not None else ""
        except BaseException as error:  # what IPython lets through
            note = errors.describe(error)[:NOTE]
        if os.getpid() != self._pid:  # the cell has forked, and this is not the process that the judge talks to
            os._exit(0)
        _wait_for(_children() - there)
        self._keep(number)
        self._wire.send(dict(op="ran", number=number, note=note))

    def _keep(self, number: int) -> None:
        """Hold on to definitions: what a later cell deletes or overwrites by a number was defined all the same."""
        for name in self._names:
            found = self._shell.user_ns.get(name)
            kept = self._defined.setdefault(name, [])
            if callable(found) and not any(found is thing for _, thing in kept[-1:]):
                kept.append((number, found))
                del kept[:-KEPT]

    # --- calls

    def _serve(self) -> None:
        """Answer calls on the connection that comes along, in a process of its own."""
        self._wire.send(dict(op="give"))
        _, (fd, *_), _, _ = _received(self._socket)
        before = self._serving
        if before is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(before, signal.SIGKILL)
        gc.freeze()
        self._serving = os.fork()
        if self._serving == 0:
            try:
                self._answer(socket.socket(fileno=fd))
            finally:
                os._exit(0)
        os.close(fd)
        if before is not None:  # what it held has been freed while the fork was made
            os.waitpid(before, 0)
        self._wire.send(dict(op="serving"))

    def _answer(self, connection: socket.socket) -> None:
        self._socket.close()
        peer = ChildPeer(Wire(connection))
        peer.show(ROOT, self._definition)
        with contextlib.suppress(WireError):
            peer.serve()

    def _definition(self, name: str, back: int) -> object:
        """The last definition of a name; with `back` an earlier one."""
        kept = self._defined[name]
        return kept[max(len(kept) - 1 - back, 0)][1]


def _children() -> set[int]:
    with contextlib.suppress(OSError):
        return {int(child) for child in Path("/proc/thread-self/children").read_text().split()}
    return set()


def _wait_for(forks: set[int], seconds: float = 1.0) -> None:
    """A little, so that if they take more than there is, it is told of the cell that made them and not of the next."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(_alive(fork) for fork in forks):
        time.sleep(0.02)


def _alive(child: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def _received(connection: socket.socket) -> tuple[bytes, list[int], int, Any]:
    connection.setblocking(True)
    try:
        return socket.recv_fds(connection, 1, 1)
    finally:
        connection.setblocking(False)


def warm_up() -> None:
    """Run a cell in a shell that is thrown away, and a call: what the first one of a process loads, its forks have."""
    main_module = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as folder:
        shell = _shell(ipython_dir=folder)
        shell.run_cell("def nothing():\n    return None", store_history=False)
    atexit.unregister(shell.atexit_operations)
    sys.modules["__main__"] = main_module
    mine, theirs = socket.socketpair()
    with mine, theirs:
        asking, answering = Peer(Wire(mine), "J", trusted=False), ChildPeer(Wire(theirs))
        answering.show(ROOT, torch.Tensor.add_)
        asking.post(ROOT, torch.zeros(2), 1.0)
        answering.answer()


def _shell(**where: str) -> Any:
    """IPython, so that magics and ! are what they are in a notebook, without its history and its debugger."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    config.InteractiveShell.color_info = False
    shell = InteractiveShell(config=config, **where)
    shell.user_ns["__name__"] = "__main__"
    return shell

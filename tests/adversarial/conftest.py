"""What there is to attack, and a grader for each level that this machine offers."""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from condiff_check import registry
from condiff_check.exercise import Exercise
from condiff_check.grading import intake, judge
from condiff_check.grading.redact import build_view
from condiff_check.grading.results import CellRun, Verdict
from condiff_check.grading.sandbox import Limits, Sandbox, SandboxError, choose

SECRET = b"secret of the fixture is this"
HURRY = 8.0  # seconds for an exercise; a loaded machine needs some for right answers
LIMITS = Limits(cell_seconds=3, notebook_seconds=30, memory=512 << 20)
MARK = f"condiff-mark-{os.getpid()}"
ROOT = Path(__file__).resolve().parents[2]
OPEN = ("/tmp", "/var/tmp", "/dev/shm", "/", str(Path.home()))  # where an attack may leave its mark


@dataclass
class World:
    """Canaries, each of which tells what became of it; `told` is what notebooks know of them."""

    told: dict[str, object]
    tree: Path
    process: subprocess.Popen
    count: list[str]

    def harm(self) -> list[str]:
        """What has changed outside of the sandbox."""
        found = [f"somebody was here: {who}" for who in self.count]
        if self.process.poll() is not None or _state(self.process.pid) not in "SR":
            found.append(f"the process ended or was stopped: {self.process.poll()}")
        now = _hashes(self.tree)
        found += [
            f"{path} changed" for path in now.keys() | self._before.keys() if now.get(path) != self._before.get(path)
        ]
        found += [f"{path} was left" for place in OPEN for path in Path(place).glob(f"{MARK}*")]
        found += [f"{name} goes on" for name in _processes() if MARK in name]
        return found

    def remember(self) -> None:
        self._before = _hashes(self.tree)


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "gone"


def _hashes(tree: Path) -> dict[str, str]:
    found = {}
    for path in sorted(tree.rglob("*")):
        about = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = f"{content} {about.st_mode} {about.st_uid} {about.st_mtime_ns} {about.st_nlink}"
    return found


def _processes() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(path.name) != os.getpid():
                comm, line = ((path / name).read_text(errors="replace") for name in ("comm", "cmdline"))
                yield f"{path.name} {comm.strip()} {line}"


def descendants() -> set[int]:
    """All processes that come from this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _listen(count: list[str], kind: str, family: int, type: int, address: object) -> socket.socket:
    """A listener that counts, and answers whoever connects."""
    server = socket.socket(family, type)
    server.bind(address)
    if type == socket.SOCK_STREAM:
        server.listen(64)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                if type == socket.SOCK_STREAM:
                    peer, _ = server.accept()
                    count.append(kind)
                    with contextlib.suppress(OSError), peer:
                        peer.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
                elif server.recvfrom(64):
                    count.append(kind)

    threading.Thread(target=serve, daemon=True).start()
    return server


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="canary-"))
    tree, home = folder / "tree", folder / "home"
    (tree / "below").mkdir(parents=True)
    home.mkdir()
    for path in (tree / "gradebook.csv", tree / "below" / "submission.ipynb", home / ".bashrc"):
        path.write_text(f"canary:{secrets.token_hex(8)}")
    for path in (folder, tree, tree / "below", home):  # as open as can be: what keeps students out is the sandbox
        path.chmod(0o777)
    os.environ["CONDIFF_CANARY"] = f"canary:{secrets.token_hex(8)}"
    held = os.open(tree / "gradebook.csv", os.O_RDONLY)
    os.set_inheritable(held, True)
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(86400)", "canary:x"], start_new_session=True
    )
    time.sleep(0.2)
    address = int(re.match("[0-9a-f]+", Path(f"/proc/{process.pid}/maps").read_text())[0], 16)
    count: list[str] = []
    abstract = f"condiff-canary-{os.getpid()}"
    tcp = _listen(count, "tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
    udp = _listen(count, "udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
    _listen(count, "abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}")
    _listen(count, "unix", socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    told = {
        "CANARY_FILE": str(tree / "gradebook.csv"),
        "CANARY_TREE": str(tree),
        "CANARY_PID": process.pid,
        "ADDRESS": address,
        "HOME": str(home),
        "JUDGE_PID": os.getpid(),
        "PORT": tcp.getsockname()[1],
        "UDP_PORT": udp.getsockname()[1],
        "ABSTRACT": abstract,
        "SOCKET_PATH": str(folder / "socket"),
        "MARK": MARK,
        "REPO": str(ROOT),
    }
    made = World(told, tree, process, count)
    made.remember()
    yield made
    process.kill()
    process.wait()
    os.close(held)
    del os.environ["CONDIFF_CANARY"]
    subprocess.run(["rm", "-rf", folder], check=True)


class Grader:
    """Judges notebooks at one level; a sandbox is made once per lesson."""

    def __init__(self, level: str, folder: Path):
        self.level, self._folder = level, folder
        self._made: dict[str, Sandbox] = {}

    def grade(
        self, content: bytes, lesson: str, only: tuple[str, ...] | None = None, limits: Limits = LIMITS
    ) -> tuple[dict[str, Verdict], tuple[CellRun, ...], tuple[str, ...]]:
        notebook = intake.read_limited(content)
        verdicts, cells, notes = judge.Judge(self.sandbox(lesson), SECRET, limits).grade(notebook, lesson, only)
        return {verdict.exercise: verdict for verdict in verdicts}, cells, notes

    def sandbox(self, lesson: str) -> Sandbox:
        if lesson not in self._made:
            self.close()  # one warm process at a time: each holds torch
            view = build_view(lesson, self._folder / f"view-{lesson}-{secrets.token_hex(4)}")
            self._made[lesson] = Sandbox(view, self.level, LIMITS)
        return self._made[lesson]

    def close(self) -> None:
        while self._made:
            self._made.popitem()[1].close()


class Graders:
    """A grader for each level that works here, made when it is asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._made: dict[str, Grader] = {}

    def at(self, level: str) -> Grader:
        """ "auto" is the best one: every machine has one. Skips the test where a level that is named does not work."""
        try:
            level = choose(level)
        except SandboxError as error:
            if level == "auto":
                raise
            pytest.skip(str(error))
        for other in [other for other in self._made if other != level]:
            self._made.pop(other).close()
        if level not in self._made:
            self._made[level] = Grader(level, self._folder)
        return self._made[level]

    def close(self) -> None:
        for grader in self._made.values():
            grader.close()


def _hurried(lesson: str) -> tuple[Exercise, ...]:
    """Endless loops are many here: an exercise has less time than it has in a course."""
    return tuple(replace(exercise, seconds=HURRY) for exercise in registry.lesson(lesson))


@pytest.fixture(scope="session")
def graders(world: World) -> Iterator[Graders]:
    judge.exercises_of = _hurried
    folder = Path(tempfile.mkdtemp(prefix="views-"))
    folder.chmod(0o755)
    made = Graders(folder)
    yield made
    made.close()
    judge.exercises_of = registry.lesson
    subprocess.run(["rm", "-rf", folder], check=True)


def with_limits(**more: object) -> Limits:
    return replace(LIMITS, **more)

"""The trusted side of the sandbox: start a warm process with torch in it, have it fork a child per submission, end it.

Three levels, each of which includes the one before: P0 (a process with limits), L1 (seccomp, Landlock, a user id of its
own when run as root) and L2 (bubblewrap around the warm process, namespaces and tmpfs around each child). A level is
offered only where `probe` has tried out, in a real child, what it promises.
"""

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from condiff_check.agent import lockdown
from condiff_check.agent.watch import descendants

from .folders import Folders, SandboxError, command
from .probing import Canaries, Probe, probing_view, try_all

LEVELS = ("P0", "L1", "L2")
LINUX = sys.platform == "linux"
START, BIRTH, DEATH = 90.0, 10.0, 1.3  # seconds that the zygote may take to get ready, to fork and to clear up
FIRST_UID, SLOTS = 64000, 500


@dataclass(frozen=True)
class Limits:
    """Of one submission. `cell_seconds` and `notebook_seconds` are the judge's to keep."""

    cell_seconds: float = 10.0
    notebook_seconds: float = 60.0
    memory: int = 2 << 30  # bytes of all processes together, beyond what they share with the zygote
    processes: int = 64  # and threads
    disk: int = 64 << 20
    output: int = 80 << 10


class Sandbox:
    """A warm process that forks children, one at a time. Use it as a context manager.

    With `paranoid` each child gets a fresh interpreter (seconds instead of milliseconds); `preload=False` leaves torch
    out and is for probes.
    """

    def __init__(
        self, view: Path, level: str, limits: Limits | None = None, paranoid: bool = False, *, preload: bool = True
    ):
        if level not in LEVELS:
            raise SandboxError(f"a level is one of {', '.join(LEVELS)}, not {level!r}")
        if os.name != "posix":
            raise SandboxError("grading needs a POSIX system: on Windows run it in WSL2, where every level works")
        if level != "P0" and not LINUX:
            raise SandboxError(f"{level} needs Linux: here only P0 is left, for submissions that you trust")
        self.view, self.level, self.limits = Path(view).resolve(), level, limits or Limits()
        self._paranoid, self._preload = paranoid, preload
        self._layers: tuple[str, ...] | None = None
        self._zygote: _Zygote | None = None
        self._child: Child | None = None
        self._slot = _Slot() if LINUX and os.geteuid() == 0 else None
        self._base = Path(tempfile.mkdtemp(prefix="condiff-")).resolve()
        self._base.chmod(0o711)  # a child of another user id must get to its folder below
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def layers(self) -> tuple[str, ...]:
        """What was really in force around the last child."""
        if self._layers is None:
            self.spawn().kill()
        return self._layers or ()

    def spawn(self) -> "Child":
        """Fork a fresh child. The one before, if it is still there, is killed."""
        if self._child is not None:
            self._child.kill()
        if self._zygote is None or not self._zygote.alive() or (self._paranoid and self._zygote.used):
            self._start()
        _empty(self._work)
        mine, theirs = socket.socketpair()
        out, into = os.pipe()
        try:
            self._layers = self._zygote.spawn(theirs.fileno(), into)
        except BaseException:
            mine.close()
            os.close(out)
            self._stop()
            raise
        finally:
            theirs.close()
            os.close(into)
        self._child = Child(self, self._zygote, mine, out)
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._stop()
        _remove(self._base)
        if self._slot:
            self._slot.close()

    def _start(self) -> None:
        self._stop()
        self._work = self._base / "work"
        self._work.mkdir(mode=0o700, exist_ok=True)
        folders = Folders(self.view)
        uid, keep = self._user(folders)
        if uid:
            os.chown(self._work, uid, uid)
        settings = {
            "level": self.level,
            "uid": uid,
            "keep": keep,
            "work": "/work" if self.level == "L2" else str(self._work),
            "limits": asdict(self.limits),
            "preload": self._preload,
            "read": folders.readable(),
            "listed": folders.listed(),
        }
        self._zygote = _Zygote(folders, settings)

    def _user(self, folders: "Folders") -> tuple[int, list[int]]:
        """As root: the user id to give a child, and the capabilities that it needs to read the interpreter."""
        if not self._slot:
            return 0, []
        if self.level == "L2" or folders.open_to_all():
            return self._slot.uid, []
        # Landlock says what may be read, so the capability to read all of that is no risk; P0 has no Landlock
        return (self._slot.uid, [lockdown.CAP_DAC_READ_SEARCH]) if self.level == "L1" else (0, [])

    def _stop(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None


@functools.cache
def probe(level: str = "L2") -> dict[str, Probe]:
    """Try out in real children of a level what it promises. About a second; once per process."""
    with tempfile.TemporaryDirectory(prefix="condiff-probe-") as folder, Canaries(Path(folder)) as canaries:
        try:
            view = probing_view(Path(folder) / "view")
            limits = Limits(memory=192 << 20, processes=24, disk=8 << 20, output=8 << 10)
            with Sandbox(view, level, limits, preload=False) as sandbox:
                found = list(try_all(sandbox, canaries))
        except (SandboxError, OSError) as error:
            found = [Probe("starts", False, str(error))]
    return {one.name: one for one in found}


def choose(wanted: str = "auto", required: str | None = None) -> str:
    """The highest level that keeps its promises here, or the one that is wanted if it does.

    Raises SandboxError, saying what to do, where that is lower than `required` or what is wanted does not work.
    """
    for name in (wanted, required):
        if name not in (*LEVELS, "auto", None):
            raise SandboxError(f"a level is one of auto, {', '.join(LEVELS)}, not {name!r}")
    refusals = []
    for level in [wanted] if wanted != "auto" else LEVELS[::-1]:
        if required in LEVELS and LEVELS.index(level) < LEVELS.index(required):
            break
        broken = [one for one in probe(level).values() if not one.works]
        if not broken:
            return level
        refusals.append(f"{level} does not work here: " + "; ".join(f"{one.name}: {one.detail}" for one in broken))
        refusals.append(_ADVICE[level])
    refusals = refusals or [f"{wanted} is less than {required}, which is required"]
    raise SandboxError("\n".join(refusals))


_ADVICE = {
    "L2": "For L2: apt install bubblewrap, and allow user namespaces (sysctl user.max_user_namespaces; on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0). A container often forbids them: run outside it, or use L1.",
    "L1": "For L1: Linux 5.13 or newer on x86_64 or aarch64, with Landlock switched on (lsm=landlock,...).",
    "P0": "P0 needs a POSIX system; on Windows use WSL2.",
}


class Child:
    """A forked child. `control` leads to its runner."""

    def __init__(self, sandbox: Sandbox, zygote: "_Zygote", control: socket.socket, out: int):
        self.control = control
        self._sandbox, self._zygote = sandbox, zygote
        self._drain = _Drain(out, sandbox.limits.output)
        self._exit: str | None = None
        self._released = False

    def exit(self) -> str | None:
        """None while it lives; else "exit 3", "signal 11", "memory", "disk", "processes" or "killed"."""
        if self._exit is None:
            self._exit = self._zygote.exit(0.0)
        return self._exit

    def kill(self) -> None:
        """End every process of the submission and wipe its files. May be called again, and after its own end."""
        if self._released:
            return
        self._released = True
        if self.exit() is None:
            self._exit = self._zygote.kill()
        self.control.close()
        self._drain.finish()
        _empty(self._sandbox._work)
        if self._sandbox._child is self:
            self._sandbox._child = None

    @property
    def output(self) -> str:
        """What it printed so far: the beginning, and the end if that is far away; control characters are left out."""
        return self._drain.text()


class _Zygote:
    """The warm process, seen from outside."""

    def __init__(self, folders: "Folders", settings: dict[str, object]):
        self.used = False
        self._level = settings["level"]
        self._ended: str | None = None
        self._buffer = b""
        self._messages: list[dict] = []
        self._link, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the zygote)
        self._process: subprocess.Popen | None = None
        line, env = command(folders, settings, theirs.fileno())
        try:
            self._run(line, env, theirs)
            self._link.sendall(json.dumps(settings).encode() + b"\n")
            answer = self._receive(START)
            if answer is None or "failed" in answer:
                raise SandboxError(self._why(answer))
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()

    def _run(self, line: Sequence[str], env: dict[str, str], theirs: socket.socket) -> None:
        """bubblewrap dies with the thread that started it, so a thread of its own does, and waits for it."""
        started = threading.Event()
        failure: list[OSError] = []

        def keep() -> None:
            try:
                self._process = subprocess.Popen(
                    line,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,
                    stderr=self._errors,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                failure.append(error)
            started.set()
            if self._process:
                self._process.wait()

        self._keeper = threading.Thread(target=keep, daemon=True, name="condiff-sandbox")
        self._keeper.start()
        started.wait()
        theirs.close()  # so that its end is the end of the link
        if failure:
            raise SandboxError(f"cannot start the sandbox: {failure[0]}")

    def _why(self, answer: dict | None) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = answer["failed"] if answer else (text[-1] if text else "it did not answer")
        return f"the sandbox does not start at level {self._level}: {reason}"

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None and self._link.fileno() >= 0

    def spawn(self, control: int, output: int) -> tuple[str, ...]:
        self.used, self._ended = True, None
        self._messages.clear()
        try:
            socket.send_fds(self._link, [b'{"order": "spawn"}\n'], [control, output])
        except OSError as error:
            raise SandboxError(f"the sandbox has gone: {error}") from None
        answer = self._receive(BIRTH)
        if answer is None or "failed" in answer:
            raise SandboxError(self._why(answer))
        return tuple(answer["layers"])

    def exit(self, seconds: float) -> str | None:
        if self._ended is None and (message := self._receive(seconds)):
            self._ended = message["exit"]
        if self._ended is None and not self.alive():
            self._ended = "killed"
        return self._ended

    def kill(self) -> str:
        with contextlib.suppress(OSError):
            self._link.sendall(b'{"order": "kill"}\n')
        if self.exit(DEATH) is None:
            self.close(patience=0.05)  # the next spawn starts another
            self._ended = "killed"
        return self._ended

    def close(self, patience: float = 1.0) -> None:
        """Closing the link is the order to clear up and leave; who does not obey is killed with all below it."""
        self._link.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
            if self._process.poll() is None:
                self._kill_tree()
            self._keeper.join(1.0)
        self._errors.close()

    def _kill_tree(self) -> None:
        pid = self._process.pid
        if LINUX and self._level != "L2":  # it must not go before its descendants have, or they are nobody's
            os.kill(pid, signal.SIGSTOP)
            deadline = time.monotonic() + 0.4
            while (below := descendants(pid)) and time.monotonic() < deadline:
                for one in below:
                    with contextlib.suppress(OSError):
                        os.kill(one, signal.SIGKILL)
                time.sleep(0.002)
        self._process.kill()

    def _receive(self, seconds: float) -> dict | None:
        deadline = time.monotonic() + seconds
        while not self._messages:
            left = max(0.0, deadline - time.monotonic())
            if self._link.fileno() < 0 or not select.select([self._link], [], [], left)[0]:
                return None
            try:
                data = self._link.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._process.wait(1.0) if self._process else None
                return None
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._messages += [json.loads(line) for line in lines]
        return self._messages.pop(0)


class _Drain:
    """Reads a pipe in a thread of its own and keeps its beginning and its end."""

    def __init__(self, fd: int, limit: int):
        self._fd, self._head_limit, self._tail_limit = fd, limit * 4 // 5, limit // 5
        self._head, self._tail, self.total = bytearray(), bytearray(), 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True, name="condiff-output")
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self._fd, 65536):
                with self._lock:
                    self._keep(piece)
        os.close(self._fd)

    def _keep(self, piece: bytes) -> None:
        self.total += len(piece)
        room = self._head_limit - len(self._head)
        self._head += piece[:room]
        if room < len(piece):
            self._tail += piece[max(0, room) :]
            del self._tail[: -self._tail_limit]

    def finish(self) -> None:
        """All writers are dead, so what is left in the pipe is soon read."""
        self._thread.join(1.0)

    def text(self) -> str:
        with self._lock:
            head, tail, total = bytes(self._head), bytes(self._tail), self.total
        left_out = total - len(head) - len(tail)
        gap = f"\n... {left_out} bytes left out ...\n" if left_out else ""
        return clean(head.decode(errors="replace")) + gap + clean(tail.decode(errors="replace"))


_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]{0,4096}(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]")
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def clean(text: str) -> str:
    """Text without terminal escapes, control and direction characters; every kind of line end becomes a newline."""
    text = _ESCAPES.sub("", text).replace("\r\n", "\n")
    text = re.sub("[\r\x0b\x0c\x85\u2028\u2029]", "\n", text)
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI))


class _Slot:
    """A user id that no other sandbox of this machine uses at the moment, held by the name of a socket."""

    def __init__(self) -> None:
        self._held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for number in range(SLOTS):
            with contextlib.suppress(OSError):
                self._held.bind(f"\0condiff-slot-{number}")
                self.uid = FIRST_UID + number
                return
        raise SandboxError(f"{SLOTS} sandboxes run on this machine already")

    def close(self) -> None:
        self._held.close()


def _empty(folder: Path) -> None:
    """What is in a folder goes, the folder stays, as it was: Landlock's rules know it by its inode."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(folder, 0o700)  # its owner, a student, may have closed it
        for entry in os.scandir(folder):
            _remove(Path(entry.path))


def _remove(path: Path) -> None:
    """However deep or closed a student made it. Nobody uses it any more."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass
    except (OSError, RecursionError):
        with contextlib.suppress(OSError):
            subprocess.run(["chmod", "-R", "u+rwX", "--", path], capture_output=True, check=False)
            subprocess.run(["rm", "-rf", "--", path], capture_output=True, check=False)

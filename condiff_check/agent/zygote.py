"""The warm process: trusted code that has everything imported, forks itself for each submission and minds the fork.

It talks to the sandbox (condiff_check/grading/sandbox.py) over one socket, in lines of JSON. It gets its settings, then
"spawn" with two descriptors (the child's end of the control socket, the end of a pipe to print into) and "kill"; it
says "ready", "born", "failed" and, when the last process of a submission is gone, "exit". It knows no secret, and
nothing that a student's code says reaches it: the fork closes this socket before that code runs.
"""

import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import time
from typing import Any

from . import lockdown
from .watch import Watch, descendants, sizes

CONTROL, TOLD = 3, 4  # descriptors in the fork
TICK = 0.05  # seconds between two looks at a submission's processes
LINUX = sys.platform == "linux"


def main(fd: int) -> None:
    link = socket.socket(fileno=fd)
    link.set_inheritable(False)
    settings = _read_settings(link)
    try:
        layers = _settle(settings)
        if settings["preload"]:
            preload()
            _wait_for_threads()
        zygote = Zygote(link, settings, layers)
        gc.collect()
        gc.freeze()  # else the first collection in a fork writes to, and so copies, every page
        if LINUX and settings["preload"]:
            lockdown.collapse()
    except Exception as error:
        _say(link, failed=f"{type(error).__name__}: {error}")
        raise
    _say(link, ready=True)
    zygote.serve()


def preload() -> None:
    """Import what students use, so that no submission waits for it. Nothing here may start a thread."""
    import numpy  # noqa: F401
    import torch
    import torch.nn.functional

    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in (
        "einops",
        "sklearn.datasets",
        "scipy.linalg",
        "tqdm.auto",
        "torch._dynamo",
        "IPython.core.interactiveshell",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        _draw_once()
    with contextlib.suppress(ImportError):
        package = importlib.import_module("condiff_ref")
        for module in pkgutil.iter_modules(package.__path__):
            with contextlib.suppress(ImportError, RuntimeError):
                importlib.import_module(f"condiff_ref.{module.name}")
    with contextlib.suppress(ImportError):
        importlib.import_module("condiff_check")
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module(f"{__package__}.runner").warm_up()


def _draw_once() -> None:
    """matplotlib finds its fonts and its backend with the first figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1, 1))
    axes.plot([0, 1])
    axes.set_title("warm")
    figure.canvas.draw()
    plt.close(figure)


def _wait_for_threads(seconds: float = 6.0) -> None:
    """matplotlib may have set a timer of 5 s while it looked for fonts; a fork is safest from a single thread."""
    deadline = time.monotonic() + seconds
    while LINUX and len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def _read_settings(link: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        piece = link.recv(1)
        if not piece:
            os._exit(0)
        line += piece
    return json.loads(line)


def _say(link: socket.socket, **message: object) -> None:
    with contextlib.suppress(OSError):
        link.sendall(json.dumps(message).encode() + b"\n")


def _settle(settings: dict[str, Any]) -> list[str]:
    """Take the place that the level asks for. Returns the layers that hold for every fork from here on."""
    os.chdir("/")
    if settings["level"] == "L2":
        _nest(settings)
    if LINUX:
        lockdown.prctl(lockdown.PR_SET_CHILD_SUBREAPER, 1)
        lockdown.prctl(lockdown.PR_SET_DUMPABLE, 0)
    if settings["level"] != "L2":
        return []
    return ["bubblewrap: read-only root with nothing of yours in it", "no network"]


def _nest(settings: dict[str, Any]) -> None:
    """In bubblewrap: go, as an ordinary user, into a user and pid namespace of which this process is the owner.

    It can then give every fork a pid namespace, a /proc and a tmpfs without being root anywhere. Bubblewrap's
    read-only patches over /proc are taken off first: the kernel lets a new /proc be mounted only where one stands bare.
    """
    for mounted in _mounts_below("/proc/"):
        lockdown.unmount(mounted)
    uid, gid = os.getuid(), os.getgid()
    if settings["uid"]:
        lockdown.become(settings["uid"])
        uid = gid = settings["uid"]
    lockdown.unshare(lockdown.CLONE_NEWUSER | lockdown.CLONE_NEWNS | lockdown.CLONE_NEWPID)
    lockdown.map_ids(1000, uid, gid)
    inner = os.fork()
    if inner:
        os.closerange(3, 256)
        os.waitpid(inner, 0)
        os._exit(0)
    nosuid = lockdown.MS_NOSUID | lockdown.MS_NODEV
    lockdown.mount("proc", "/proc", nosuid | lockdown.MS_NOEXEC)
    lockdown.mount("tmpfs", "/tmp", nosuid, "size=16777216,mode=0700")  # matplotlib keeps its list of fonts there
    os.environ.pop("PWD", None)


def _mounts_below(prefix: str) -> list[str]:
    with open("/proc/self/mountinfo") as file:
        points = [line.split()[4] for line in file]
    return [point for point in points if point.startswith(prefix)][::-1]


class Zygote:
    """Forks one submission at a time, watches its processes, and clears all of them away."""

    def __init__(self, link: socket.socket, settings: dict[str, Any], layers: list[str]):
        self._link, self._settings, self._layers = link, settings, layers
        self._level, self._limits, self._work = settings["level"], settings["limits"], settings["work"]
        self._buffer, self._orders, self._fds = b"", [], []
        self._pid: int | None = None
        self._reason: str | None = None
        self._watch = Watch(self._limits, None if self._level == "L2" else self._work) if LINUX else None
        self._filter = self._rules = None
        if self._level != "P0":
            scoped = lockdown.landlock_abi() >= 6
            self._filter = lockdown.seccomp_filter(signals=scoped or self._level == "L2")
        if self._level == "L1" and lockdown.landlock_abi():
            self._rules = lockdown.file_rules(settings["read"], settings["listed"], [self._work])
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if self._level == "L2" else -1
        self._alarm, alarm = os.pipe()
        for fd in (self._alarm, alarm):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._leave())
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)

    def serve(self) -> None:
        while True:
            wait = TICK if self._pid is not None else None
            ready, _, _ = select.select([self._link, self._alarm], [], [], wait)
            if self._alarm in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._alarm, 4096)
            if self._link in ready:
                self._hear()
            if self._pid is not None:
                self._look()

    def _hear(self) -> None:
        data, fds, _, _ = socket.recv_fds(self._link, 4096, 2)
        if not data:
            self._leave()
        self._buffer += data
        self._fds += fds
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            order = json.loads(line)["order"]
            if order == "spawn":
                self._spawn(self._fds.pop(0), self._fds.pop(0))
            elif order == "kill" and self._pid is not None:
                self._reason = "killed"
                self._bury()

    def _leave(self) -> None:
        """The sandbox is gone: so is everything that was run for it."""
        if self._pid is not None:
            self._clear()
        os._exit(0)

    # --- one submission

    def _spawn(self, control: int, output: int) -> None:
        status, told = os.pipe()
        self._reason = None
        if self._watch:
            self._watch.start()
        try:
            self._pid = self._fork(control, output, told)
        except OSError as error:
            self._pid = None
            _say(self._link, failed=f"cannot start a process: {error}")
            return
        finally:
            for fd in (control, output, told):
                os.close(fd)
        with open(status, "rb") as file:
            answer = json.loads(file.read() or '{"failed": "it died while it was being locked down"}')
        if "failed" in answer:
            self._clear()
            _say(self._link, **answer)
        else:
            _say(self._link, born=True, layers=[*self._layers, *answer["layers"]])

    def _fork(self, control: int, output: int, told: int) -> int:
        if self._level == "L2":  # the next fork is the first process of a pid namespace: with it, all of them die
            lockdown.unshare(lockdown.CLONE_NEWPID)
        try:
            pid = os.fork()
            if not pid:
                self._become_child(control, output, told)
        finally:
            if self._level == "L2":
                lockdown.setns(self._own_pids, lockdown.CLONE_NEWPID)
        return pid

    def _look(self) -> None:
        """Has it ended? Does it hold more than it may?"""
        while self._pid is not None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid == self._pid:
                self._reason = self._reason or _describe(status)
                self._pid = -1
                self._bury()
        if self._pid is not None and self._watch and (reason := self._watch.look()):
            self._reason = reason
            self._bury()

    def _clear(self) -> None:
        """Kill whatever descends from here until nothing does.

        The dead are reaped only when none is alive: until then they count as processes, and bound those that fork on.
        """
        pid, self._pid = self._pid, None
        self._sweep(pid)
        while True:
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if ended == pid:
                self._reason, pid = self._reason or _describe(status), -1
            if not ended:
                time.sleep(0.001)
                self._sweep(pid)

    def _bury(self) -> None:
        self._clear()
        _say(self._link, exit=self._reason)

    def _sweep(self, pid: int | None) -> None:
        if pid is not None and pid > 0:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            if self._level != "L2":
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
        while LINUX and self._level != "L2" and (alive := descendants(os.getpid())):
            for one in alive:
                with contextlib.suppress(OSError):
                    os.kill(one, signal.SIGKILL)
            time.sleep(0.001)

    # --- in the fork

    def _become_child(self, control: int, output: int, told: int) -> None:
        """Never returns. What goes wrong before the runner starts is told to the zygote."""
        try:
            try:
                self._prepare(control, output, told)
                layers = self._lock_down()
                os.write(TOLD, json.dumps({"layers": layers}).encode())
            except BaseException as error:
                os.write(TOLD, json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
                os._exit(1)
            os.close(TOLD)
            runner = importlib.import_module(f"{__package__}.runner")
            runner.main(socket.socket(fileno=CONTROL))
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
        except BaseException:
            with contextlib.suppress(BaseException):
                import traceback

                traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _prepare(self, control: int, output: int, told: int) -> None:
        """Nothing of the zygote's is left open but the control socket as 3 and, for a moment more, `told` as 4."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        self._link.detach()
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (control, told, output)]
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, place in ((nothing, 0), (moved[2], 1), (moved[2], 2)):
            os.dup2(fd, place)
        for fd, place in ((moved[0], 3), (moved[1], 4)):
            os.dup2(fd, place, inheritable=False)
        kept = self._rules.fd if self._rules else 4
        os.closerange(5, max(5, kept))
        os.closerange(kept + 1, 256)
        for fd, names in ((1, ("stdout", "__stdout__")), (2, ("stderr", "__stderr__"))):
            stream = io.TextIOWrapper(
                io.FileIO(fd, "w", closefd=False), "utf-8", "backslashreplace", line_buffering=True
            )
            for name in names:
                setattr(sys, name, stream)

    def _lock_down(self) -> list[str]:
        limits, layers = self._limits, []
        if LINUX:
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
        mapped = sizes("self").get("VmSize", 0)
        if self._level == "L2":
            lockdown.enclose(self._work, limits["disk"])
            layers += ["user namespace", "pid namespace", "own /proc", f"private tmp {limits['disk'] >> 20} MiB"]
        elif self._settings["uid"]:
            lockdown.become(self._settings["uid"], self._settings["keep"])
            layers.append("user id of its own")
        os.chdir(self._work)
        os.umask(0o077)
        bounds = self._resource_limits(mapped)  # /proc is still in sight
        if self._level != "P0":
            layers += self._fence_files()
        lockdown.limit(bounds)
        layers.append("rlimits")
        if LINUX:
            lockdown.prctl(lockdown.PR_SET_PDEATHSIG, signal.SIGKILL)
            lockdown.prctl(lockdown.PR_SET_DUMPABLE, 1)  # so that the zygote can read what it holds
            layers.append("memory watchdog")
        if self._filter:
            lockdown.install_seccomp(self._filter)
            layers += ["no_new_privs", "seccomp", "no new sockets"]
        return layers

    def _fence_files(self) -> list[str]:
        abi = lockdown.landlock_abi()
        if self._level == "L2" and abi:  # the mounts hide files; this keeps signals and writes in as well
            rules = lockdown.file_rules(["/"], [], [self._work, "/tmp", "/dev/shm"])
        elif self._rules:
            rules = self._rules
            rules.read(f"/proc/{os.getpid()}")
        else:
            return []
        rules.enforce()
        return [f"Landlock ABI {abi}"]

    def _resource_limits(self, mapped: int) -> dict[str, int]:
        limits = self._limits
        counted = {"NPROC": limits["processes"] + self._others()} if self._bounds_processes() else {}
        return {
            "CORE": 0,
            "FSIZE": limits["disk"],
            "NOFILE": 256,
            "MSGQUEUE": 0,
            "AS": mapped + limits["memory"],
            **counted,
        }

    def _bounds_processes(self) -> bool:
        """Root is exempt from the kernel's count."""
        return LINUX and os.getuid() != 0

    def _others(self) -> int:
        """The kernel counts all that a user runs; where the user is not the submission's own, allow for the rest."""
        if self._level == "L2" or self._settings["uid"]:
            return 0
        mine, total = str(os.getuid()), 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}").st_uid == int(mine):
                    total += sizes(pid).get("Threads", 1)
        return total


def _describe(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit {os.WEXITSTATUS(status)}"

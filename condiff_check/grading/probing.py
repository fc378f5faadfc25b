"""Try out, in children that run probes.py, what each level of the sandbox promises."""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sandbox import Child, Sandbox

LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Probe:
    """One thing that a level promises, and whether it held when it was tried."""

    name: str
    works: bool
    detail: str = ""


class Canaries:
    """What no child may reach: a file, a folder that anybody may write to, a process, two listeners."""

    def __init__(self, folder: Path):
        folder.chmod(0o755)
        self.folder = folder / "canary"
        self.folder.mkdir(mode=0o777)
        self.folder.chmod(0o777)
        self.file = self.folder / "secret"
        self.file.write_text("sings")
        self.port = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.name = f"condiff-canary-{os.getpid()}-{id(self)}"

    def __enter__(self) -> "Canaries":
        self.process = subprocess.Popen(["/bin/sleep", "600"], stdin=subprocess.DEVNULL)
        if LINUX:
            self.abstract.bind("\0" + self.name)
            self.abstract.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.port.close()
        self.abstract.close()


def probing_view(folder: Path) -> Path:
    """The agent with probes.py in place of its runner."""
    from condiff_check import agent

    package = folder / "condiff_agent"
    package.mkdir(parents=True)
    for name in ("__init__.py", "lockdown.py", "watch.py", "zygote.py"):
        shutil.copyfile(Path(agent.__file__).parent / name, package / name)
    shutil.copyfile(Path(__file__).parent / "probes.py", package / "runner.py")
    return folder


def ask(child: "Child", do: str, *arguments: object, seconds: float = 5.0) -> object:
    """One question to a child that runs probes.py. OSError tells what it met there, or "it ended" if it did not say."""
    with contextlib.suppress(OSError):
        child.control.sendall(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
    deadline, data = time.monotonic() + seconds, b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([child.control], [], [], left)[0]:
            raise TimeoutError(f"no answer to {do} in {seconds:.0f} s")
        try:
            piece = child.control.recv(65536)
        except OSError:
            piece = b""
        if not piece:
            raise OSError("it ended")
        data += piece
    answer = json.loads(data)
    if "error" in answer:
        raise OSError(answer["error"])
    return answer["value"]


def try_all(sandbox: "Sandbox", canaries: Canaries) -> Iterator[Probe]:
    child = sandbox.spawn()
    for name, expected, do, *arguments in (
        ("forks", 7, "to_fork"),
        ("passes descriptors", "through", "to_pass_a_descriptor"),
        ("has files of its own", "kept", "a_private_file"),
        ("runs a shell", 5, "a_shell"),
    ):
        yield _allowed(child, name, expected, do, *arguments)
    if sandbox.level != "P0":
        yield from _refusals(child, sandbox.level, canaries)
    child.kill()
    yield from _bounds(sandbox)


def _allowed(child: "Child", name: str, expected: object, do: str, *arguments: object) -> Probe:
    try:
        value = ask(child, do, *arguments)
    except OSError as error:
        return Probe(name, False, str(error))
    return Probe(name, value == expected, "" if value == expected else f"got {value!r}")


def _refusals(child: "Child", level: str, canaries: Canaries) -> Iterator[Probe]:
    pid = canaries.process.pid
    alone = level == "L2"  # there is nothing to be refused where it is alone with its own
    for name, do, *arguments in (
        ("hides a file that all may read", "to_read", str(canaries.file)),
        ("hides this package", "to_read", str(Path(__file__))),
        ("hides the users", "to_read", "/etc/passwd"),
        ("hides a folder that all may read", "to_list", str(canaries.folder)),
        ("hides /var", "to_list", "/var"),
        ("no files in a folder that all may write to", "to_write", f"{canaries.folder}/new"),
        ("no files in /var/tmp", "to_write", "/var/tmp/condiff-canary"),
        ("no files in /usr", "to_write", "/usr/condiff-canary"),
        ("no files in /dev", "to_write", "/dev/condiff-canary"),
        ("no network", "to_connect", canaries.port.getsockname()[1]),
        ("no sockets of others", "an_abstract_socket", canaries.name),
        ("no datagrams", "an_address"),
        ("no signals to others", "a_signal", pid),
        *((("no signals to all", "signals_to_all"),) if alone else ()),
        ("no sight of others", "to_see", pid),
        ("no memory of others", "to_read_memory", pid),
        *(() if alone else (("no environment of others", "to_read", f"/proc/{pid}/environ"),)),
        ("no namespaces", "a_namespace"),
        ("no doors of the kernel", "doors_of_the_kernel"),
    ):
        yield _refused(child, name, do, *arguments)
    operation = os.strerror(1)
    gone = (operation, os.strerror(3))
    for name, expected, do, *arguments in (
        ("no tracing", (operation,), "to_trace", pid),
        ("no limits of others", gone, "other_limits", pid),
        ("no new privileges", (1,), "new_privileges"),
    ):
        try:
            value = ask(child, do, *arguments)
        except OSError as error:
            value = str(error)
        yield Probe(name, value in expected, "" if value in expected else f"got {value!r}")
    alive = canaries.process.poll() is None and not (canaries.folder / "new").exists()
    yield Probe("leaves others alone", alive, "" if alive else "a process or a file outside was changed")


def _refused(child: "Child", name: str, do: str, *arguments: object) -> Probe:
    try:
        value = ask(child, do, *arguments)
    except OSError as error:
        if "it ended" in str(error) or isinstance(error, TimeoutError):
            return Probe(name, False, str(error))
        return Probe(name, True, str(error))
    return Probe(name, False, f"got {str(value)[:60]!r}")


def _bounds(sandbox: "Sandbox") -> Iterator[Probe]:
    """Each in a child of its own, as it may be the end of it."""
    limits = sandbox.limits
    yield _stopped(sandbox, "bounds the memory of a process", "much_memory", limits.memory * 2)
    if LINUX:
        share = limits.memory // 4 * 3
        yield _stopped(sandbox, "bounds the memory of all", "memory_of_many", share, 4, ends=("memory",))
    if sandbox.level != "P0":
        folders = ("/work", "/tmp", "/dev/shm") if sandbox.level == "L2" else (".",)
        for folder in folders:
            yield _stopped(sandbox, f"bounds the disk {folder}", "to_fill", folder, limits.disk)
        yield _few_processes(sandbox)
    yield _no_survivor(sandbox)
    yield _short_output(sandbox)
    yield _ends(sandbox)


def _stopped(sandbox: "Sandbox", name: str, do: str, *arguments: object, ends: Sequence[str] = ()) -> Probe:
    """Refused with an error or, where `ends` says so, by the end of the child."""
    child = sandbox.spawn()
    try:
        detail = f"got {ask(child, do, *arguments)!r}"
    except TimeoutError as error:
        return Probe(name, False, str(error))
    except OSError as error:
        ended = _wait(child) if "it ended" in str(error) else None
        works = ended in (ends or ("memory", "disk", "processes")) if ended else not ends
        return Probe(name, works, ended or str(error))
    finally:
        child.kill()
    return Probe(name, False, detail)


def _wait(child: "Child", seconds: float = 2.0) -> str | None:
    deadline = time.monotonic() + seconds
    while child.exit() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return child.exit()


def _few_processes(sandbox: "Sandbox") -> Probe:
    name, most = "bounds processes", sandbox.limits.processes
    child = sandbox.spawn()
    try:
        made = ask(child, "many_processes", 8 * most)
    except OSError as error:
        ended = _wait(child)
        return Probe(name, ended == "processes", ended or str(error))
    finally:
        child.kill()
    return Probe(name, made <= 2 * most, f"{made} made")


def _no_survivor(sandbox: "Sandbox") -> Probe:
    child = sandbox.spawn()
    child.control.sendall(json.dumps({"do": "to_outlive", "with": []}).encode() + b"\n")
    try:
        child.control.settimeout(5)
        _, fds, _, _ = socket.recv_fds(child.control, 1, 1)
    except OSError as error:
        return Probe("leaves no process behind", False, str(error))
    finally:
        child.kill()
    with socket.socket(fileno=fds[0]) as line:
        gone = bool(select.select([line], [], [], 1.0)[0])
    return Probe("leaves no process behind", gone, "" if gone else "a daemon lives on")


def _short_output(sandbox: "Sandbox") -> Probe:
    child = sandbox.spawn()
    try:
        ask(child, "to_print", 4 << 20, seconds=10)
    except OSError as error:
        return Probe("bounds output", False, str(error))
    finally:
        child.kill()
    text = child.output
    works = 0 < len(text) < 2 * sandbox.limits.output and "\x1b" not in text
    return Probe("bounds output", works, f"{len(text)} characters")


def _ends(sandbox: "Sandbox") -> Probe:
    child = sandbox.spawn()
    with contextlib.suppress(OSError):
        ask(child, "to_go_on", seconds=0.1)
    start = time.monotonic()
    child.kill()
    took = time.monotonic() - start
    return Probe("ends what does not end", child.exit() == "killed" and took < 2, f"{took:.2f} s")

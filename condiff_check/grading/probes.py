"""What a probe does inside a child: this file stands in for the runner there. It imports the standard library only.

Each function tries one thing that a submission might, and returns what came of it; nothing here does harm where the
sandbox fails to stop it.
"""

import array
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time

REPLACED = "condiff_agent/runner.py"


def main(control: socket.socket) -> None:
    lines = control.makefile("rb")
    while line := lines.readline():
        request = json.loads(line)
        try:
            answer = {"value": globals()["try_" + request["do"]](*request["with"])}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        control.sendall(json.dumps(answer).encode() + b"\n")


def _system_call(name: str, *arguments: int) -> str:
    """ "allowed", or the reason why not."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, name)(*(ctypes.c_long(n) for n in arguments))
    return "allowed" if result >= 0 else os.strerror(ctypes.get_errno())


def try_to_fork() -> int:
    pid = os.fork()
    if not pid:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def try_to_pass_a_descriptor() -> str:
    left, right = socket.socketpair()
    mine, theirs = socket.socketpair()
    socket.send_fds(left, [b"x"], [theirs.fileno()])
    _, (fd, *_), _, _ = socket.recv_fds(right, 1, 1)
    os.write(fd, b"through")
    return mine.recv(100).decode()


def try_a_private_file() -> str:
    with tempfile.NamedTemporaryFile("w+", dir=".") as file:
        file.write("kept")
        file.seek(0)
        return file.read()


def try_a_shell() -> int:
    return os.waitstatus_to_exitcode(os.system("exit 5"))


def try_to_read(path: str) -> str:
    with open(path) as file:
        return file.read()


def try_to_list(path: str) -> list[str]:
    return os.listdir(path)


def try_to_write(path: str) -> str:
    with open(path, "w") as file:
        file.write("here")
    return "written"


def try_to_connect(port: int) -> str:
    with socket.socket() as one:
        one.settimeout(1)
        one.connect(("127.0.0.1", port))
    return "connected"


def try_an_abstract_socket(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(1)
        one.connect("\0" + name)
    return "connected"


def try_an_address() -> str:
    """A datagram needs no connection."""
    one, _ = socket.socketpair(type=socket.SOCK_DGRAM)
    one.sendto(b"x", "\0nobody")
    return "sent"


def try_a_signal(pid: int) -> str:
    os.kill(pid, signal.SIGTERM)
    return "sent"


def try_signals_to_all() -> str:
    """Signal 0 harms nobody and says whether a real one would have arrived."""
    os.kill(-1, 0)
    return "sent"


def try_to_see(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def try_to_trace(pid: int) -> str:
    return _system_call("ptrace", 16, pid, 0, 0)


def try_to_read_memory(pid: int) -> str:
    with open(f"/proc/{pid}/mem", "rb") as file:
        return file.read(0).decode()


def try_other_limits(pid: int) -> str:
    return _system_call("prlimit", pid, 7, 0, 0)


def try_a_namespace() -> str:
    if (pid := os.fork()) == 0:
        os._exit(0 if _system_call("unshare", 0x10000000) == "allowed" else 1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        return "allowed"
    raise PermissionError("unshare")


def try_doors_of_the_kernel() -> str:
    """The system calls that have the worst record; by number, the same on every machine from 424 on."""
    numbers = {"io_uring_setup": 425, "open_tree": 428, "pidfd_getfd": 438, "fsopen": 430}
    here = {"x86_64": {"bpf": 321, "userfaultfd": 323, "keyctl": 250}, "aarch64": {"bpf": 280, "keyctl": 219}}
    numbers.update(here.get(os.uname().machine, {}))
    results = {name: _system_call("syscall", number, 0, 0, 0, 0) for name, number in numbers.items()}
    reached = [name for name, result in results.items() if result != os.strerror(1)]
    if reached:
        return " ".join(reached)
    raise PermissionError("all of them")


def try_new_privileges() -> int:
    return ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)


def try_capabilities() -> str:
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith("CapEff"))


def try_much_memory(size: int) -> str:
    block = bytearray(size)
    return str(len(block))


def try_memory_of_many(size: int, processes: int) -> None:
    for _ in range(processes):
        if not os.fork():
            block = bytearray(size)
            for at in range(0, size, 4096):
                block[at] = 1
            time.sleep(60)
    time.sleep(60)


def try_many_processes(number: int) -> int:
    made = []
    try:
        for _ in range(number):
            pid = os.fork()
            if not pid:
                time.sleep(60)
                os._exit(0)
            made.append(pid)
    except BlockingIOError:
        pass
    time.sleep(0.3)  # the watchdog's turn
    return len(made)


def try_to_fill(folder: str, size: int) -> str:
    for number in range(16):
        with open(f"{folder}/{number}", "wb") as file:
            for _ in range(0, size // 4, 1 << 20):
                file.write(bytes(1 << 20))
                file.flush()
    time.sleep(1)
    return "filled"


def try_to_outlive() -> str:
    """A daemon that holds one end of a pair: the other end, sent to the parent, says whether it still lives."""
    mine, theirs = socket.socketpair()
    if not os.fork():
        os.setsid()
        if not os.fork():
            theirs.close()
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(60)
        os._exit(0)
    os.wait()
    mine.close()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
    socket.socket(fileno=os.dup(3)).sendmsg([b"\n"], rights)
    return "started"


def try_to_print(size: int) -> str:
    for _ in range(0, size, 1 << 16):
        os.write(1, b"\x1b[31mred\x1b[0m\x07" * (1 << 12))
    return "printed"


def try_to_go_on() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    while True:
        pass


def try_to_exit(code: int) -> None:
    os._exit(code)


def try_to_crash() -> None:
    ctypes.string_at(0)


def try_python() -> str:
    return sys.version

"""Attacks 29 to 52: reading secrets, ending, hanging and getting out.

Names in capitals come from the notebook's first cell: CANARY_FILE (a file that begins with "canary:"), CANARY_TREE (a
folder whose files must stay as they are), CANARY_PID (a process that must live), PORT and UDP_PORT (listeners on
127.0.0.1 that count), ABSTRACT (the name of an abstract unix socket that counts), JUDGE_PID, MARK (what escaped
processes and files are to be called), REPO.
"""

import platform
from textwrap import indent

from attacks_common import LOST, PRIZE, WRONG, ZERO, Attack, body, everywhere, sandboxed

from notebooks import text

SYSCALL = """\
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
got = False
"""


def prize(number: str, name: str, cell: str, expect=None, **more) -> Attack:
    """An attack that sets `got` where it succeeds."""
    return Attack(number, name, (cell, PRIZE), expect or sandboxed(*LOST), prize=True, **more)


def inside(*lines: str) -> tuple[str, ...]:
    """The deed is done in the function, while it is being judged."""
    return (body(*lines, "return x0"),)


def ends(number: str, name: str, *lines: str, outcomes=("died",), **more) -> Attack:
    return Attack(number, name, inside(*lines), more.pop("expect", everywhere(*outcomes)), **more)


def cell_ends(number: str, name: str, cell: str, **more) -> Attack:
    """The deed is done in a cell: it is left out, and what other cells define is graded."""
    return Attack(number, f"{name} in a cell", (cell, WRONG), more.pop("expect", everywhere("wrong")), **more)


READING = (
    prize(
        "29",
        "reads a file",
        text("""
            got = False
            try:
                got = open(CANARY_FILE).read().startswith('canary:')
            except OSError as error:
                print(error)
        """),
        fast=True,
    ),
    prize(
        "29",
        "reads a file by the shell",
        text("""
            text = !cat "$CANARY_FILE"
            got = any(line.startswith('canary:') for line in text)
        """),
    ),
    prize(
        "29",
        "reads a file through proc",
        text("""
            got = False
            ways = [f'/proc/{pid}/root' for pid in (JUDGE_PID, 1, os.getppid(), 'self')]
            for way in [*ways, f'/proc/{JUDGE_PID}/cwd/../../../../../..']:
                try:
                    got |= open(way + CANARY_FILE).read().startswith('canary:')
                except OSError as error:
                    print(error)
        """),
    ),
    prize(
        "29",
        "a link made in its own folder",
        text("""
            got = False
            for make in (os.symlink, os.link):
                try:
                    make(CANARY_FILE, 'borrowed')
                    got |= open('borrowed').read().startswith('canary:')
                except OSError as error:
                    print(error)
                finally:
                    os.path.lexists('borrowed') and os.unlink('borrowed')
        """),
    ),
    prize(
        "29",
        "lists a folder",
        text("""
            got = False
            try:
                got = len(os.listdir(CANARY_TREE)) > 0
            except OSError as error:
                print(error)
        """),
    ),
    prize(
        "29",
        "searches the processes' environment and command lines",
        text("""
            got = False
            listed = filter(str.isdigit, os.listdir('/proc')) if os.access('/proc', os.R_OK) else []
            for pid in [*listed, JUDGE_PID, os.getppid()]:
                for name in ('environ', 'cmdline'):
                    try:
                        got |= b'canary:' in open(f'/proc/{pid}/{name}', 'rb').read()
                    except OSError:
                        pass
        """),
    ),
    prize(
        "29", "its own environment", "got = any('canary:' in value for value in os.environ.values())", everywhere(*LOST)
    ),
    prize(
        "29",
        "the passwords of the machine",
        text("""
            got = False
            try:
                got = len(open('/etc/shadow').read()) > 0
            except OSError as error:
                print(error)
        """),
    ),
    prize(
        "29",
        "the home of whoever grades",
        text("""
            got = False
            for home in (os.path.expanduser('~'), '/root', HOME):
                try:
                    got |= open(os.path.join(home, '.bashrc')) is not None
                except OSError as error:
                    print(error)
        """),
    ),
    prize(
        "29",
        "open files of the parents",
        text("""
            got = False
            for pid in (JUDGE_PID, os.getppid(), 1):
                try:
                    for fd in os.listdir(f'/proc/{pid}/fd'):
                        try:
                            copy = os.open(f'/proc/{pid}/fd/{fd}', os.O_RDONLY | os.O_NONBLOCK)
                            got |= os.pread(copy, 7, 0) == b'canary:'
                        except OSError:
                            pass
                except OSError:
                    pass
        """),
    ),
    prize(
        "29",
        "memory of the judge",
        text("""
            got = False
            try:
                got = open(f'/proc/{JUDGE_PID}/mem', 'rb') is not None
            except OSError as error:
                print(error)
        """),
    ),
    prize(
        "29",
        "files it was left by inheritance",
        text("""
            got = False
            for fd in range(3, 256):
                try:
                    got |= os.pread(fd, 7, 0) == b'canary:'
                except OSError:
                    pass
        """),
        everywhere(*LOST),
        about="the fixture holds the canary open and inheritable while it grades",
    ),
    prize(
        "30",
        "traces a process",
        SYSCALL
        + text("""
            got = libc.ptrace(16, CANARY_PID, 0, 0) == 0  # PTRACE_ATTACH
            if got:
                os.waitpid(CANARY_PID, 0x40000000)
                libc.ptrace(17, CANARY_PID, 0, 0)
        """),
    ),
    prize(
        "30",
        "reads the memory of a process",
        SYSCALL
        + text("""
            class Part(ctypes.Structure):
                _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
            mine = ctypes.create_string_buffer(8)
            here = Part(ctypes.addressof(mine), 8)
            for there in (Part(ADDRESS, 8), Part(0x400000, 8)):
                got |= libc.process_vm_readv(CANARY_PID, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0
        """),
    ),
    prize(
        "30",
        "takes a file from a process",
        SYSCALL
        + text("""
            fd = libc.syscall(434, CANARY_PID, 0)  # pidfd_open
            got = fd >= 0 and libc.syscall(438, fd, 1, 0) >= 0  # pidfd_getfd
        """),
    ),
    Attack(
        "31",
        "prints the hidden inputs",
        (
            body(
                "print('LEAK', x0.flatten().tolist())", "sys.stderr.write(f'LEAK {x0.flatten().tolist()}')", "return x0"
            ),
        ),
        everywhere("wrong"),
        "no verdict may hold what was printed",
        fast=True,
    ),
    Attack(
        "32",
        "hides the inputs in its error",
        (body("raise ValueError('LEAK' + ' '.join(f'{v:.17g}' for v in x0.flatten().tolist()))"),),
        everywhere("raised"),
        "a message is cut; how much of it a student sees is decided by the reports",
    ),
)

STOPS = (
    "raise SystemExit(0)",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "sys.exit('bye')",
    "exit()",
    "raise BaseException('x')",
)
ENDING = (
    *(cell_ends("34", line, line) for line in STOPS),
    *(ends("34", line, line, outcomes=("raised", "died")) for line in STOPS if line != "exit()"),
    ends("35", "os._exit", "os._exit(0)", fast=True),
    ends("35", "abort", "os.abort()"),
    ends("35", "segmentation fault", "import ctypes", "ctypes.string_at(0)", fast=True),
    ends("35", "faulthandler's segmentation fault", "import faulthandler", "faulthandler._sigsegv()"),
    ends("35", "kills itself", "import signal", "os.kill(os.getpid(), signal.SIGKILL)"),
    ends("35", "executes another program", "os.execv('/bin/true', ['true'])", outcomes=("died", "raised", "protocol")),
    ends(
        "35",
        "stops itself",
        "import signal",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        outcomes=("timeout", "wrong", "died"),
    ),
    ends(
        "35",
        "overflows the stack",
        "import threading",
        "sys.setrecursionlimit(10**9)",
        "f = lambda: f()",
        "f()",
        outcomes=("died", "raised", "memory", "timeout"),
    ),
    cell_ends("35", "os._exit", "os._exit(0)", fast=True),
    cell_ends(
        "35",
        "segmentation fault",
        text("""
        import ctypes
        ctypes.string_at(0)
    """),
    ),
    cell_ends(
        "35",
        "kills its parent",
        text("""
            import signal
            os.kill(os.getppid(), signal.SIGKILL)
        """),
        expect=sandboxed("wrong"),
    ),
    cell_ends("35", "executes another program", "os.execv('/bin/true', ['true'])"),
    ends("36", "endless loop", "while True:", "    pass", outcomes=("timeout",), fast=True),
    ends(
        "36",
        "endless loop that ignores all",
        "import signal",
        "for number in range(1, 65):",
        "    try:",
        "        signal.signal(number, signal.SIG_IGN)",
        "    except (OSError, ValueError):",
        "        pass",
        "while True:",
        "    try:",
        "        while True:",
        "            pass",
        "    except BaseException:",
        "        pass",
        outcomes=("timeout",),
    ),
    cell_ends(
        "36",
        "endless loop that ignores all",
        text("""
            import signal
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    pass
        """),
        fast=True,
    ),
    ends("37", "sleeps", "import time", "time.sleep(1e9)", outcomes=("timeout", "raised")),
    ends("37", "waits for input", "input()", outcomes=("raised", "timeout")),
    ends("37", "breakpoint", "breakpoint()", outcomes=("raised", "timeout", "wrong")),
    cell_ends("37", "waits for input", "name = input('who are you? ')"),
    cell_ends("37", "breakpoint", "breakpoint()"),
    cell_ends(
        "37",
        "debugger after an error",
        text("""
        1 / 0
        %debug
    """),
    ),
    cell_ends("37", "debug magic", "%debug"),
    cell_ends(
        "37",
        "sleeps",
        text("""
        import time
        time.sleep(1e9)
    """),
    ),
    ends("38", "regular expression", "import re", "re.match(r'(a+)+$', 'a' * 60 + 'b')", outcomes=("timeout",)),
    ends("38", "power of integers", "7 ** (10 ** 9)", outcomes=("timeout", "memory", "raised", "died")),
    ends("38", "native loop", "sum(iter(int, 1))", outcomes=("timeout",)),
    ends(
        "38",
        "native product",
        "a = torch.randn(3000, 3000)",
        "for _ in range(10**6): a = a @ a",
        outcomes=("timeout", "memory", "raised"),
    ),
    cell_ends("38", "native loop", "sum(iter(int, 1))"),
    Attack(
        "39",
        "a daemon",
        (
            text("""
                import time
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        import ctypes
                        ctypes.CDLL(None).prctl(15, MARK.encode(), 0, 0, 0)  # PR_SET_NAME
                        time.sleep(600)
                    os._exit(0)
            """),
            WRONG,
        ),
        sandboxed("wrong"),
        fast=True,
    ),
    Attack(
        "39",
        "a daemon by the shell",
        (
            text("""
                !setsid sh -c 'sleep 600; : $MARK' >/dev/null 2>&1 &
                !(nohup sh -c 'sleep 600; : $MARK' >/dev/null 2>&1 &) &
            """),
            WRONG,
        ),
        sandboxed("wrong"),
    ),
    Attack(
        "39",
        "a daemon from the function",
        inside(
            "if os.fork() == 0:",
            "    os.setsid()",
            "    if os.fork() == 0:",
            "        import time",
            "        time.sleep(600)",
            "    os._exit(0)",
        ),
        sandboxed(*ZERO),
    ),
    ends(
        "39",
        "fork bomb",
        "for _ in range(500):",
        "    try:",
        "        if os.fork() == 0:",
        "            import time",
        "            time.sleep(600)",
        "    except OSError:",
        "        pass",
        expect=sandboxed(*ZERO),
    ),
    cell_ends(
        "39",
        "fork bomb",
        text("""
            import time
            for _ in range(500):
                try:
                    if os.fork() == 0:
                        time.sleep(600)
                        os._exit(0)
                except OSError:
                    pass
        """),
        expect=sandboxed(*ZERO),
        spares=(),  # the sleepers hold the memory that its own answers need
    ),
    cell_ends(
        "39",
        "fork bomb that multiplies",
        text("""
            for _ in range(9):  # 512 processes
                try:
                    os.fork()
                except OSError:
                    pass
        """),
        expect=sandboxed(*ZERO),
        about="copies of the runner, each of which believes that it is the one",
    ),
    cell_ends(
        "40",
        "thread bomb",
        text("""
            import threading, time
            threads = []
            try:
                for _ in range(500):
                    threads.append(threading.Thread(target=time.sleep, args=(600,), daemon=True))
                    threads[-1].start()
            except RuntimeError as error:
                print(error)
        """),
        expect=sandboxed("wrong", "missing", "died"),
        spares=(),
    ),
)

HUGE = {
    "tensors": text("""
        hoard = []
        for _ in range(16):
            hoard.append(torch.ones(2**26))  # 256 MB
    """),
    "lists": text("""
        hoard = []
        for _ in range(64):
            hoard.append([0] * (8 * 2**20))
    """),
    "shared memory map": text("""
            import mmap
            hoard = []
            for _ in range(16):
                hoard.append(mmap.mmap(-1, 2**28))
                for place in range(0, 2**28, 4096):
                    hoard[-1][place] = 1
        """),
    "shm": text("""
            with open('/dev/shm/' + MARK, 'wb') as file:
                for _ in range(256):
                    file.write(b'x' * 2**24)
        """),
    "memfd": text("""
            hoard = os.memfd_create('hoard')
            for _ in range(256):
                os.write(hoard, b'x' * 2**24)
        """),
    "many processes": text("""
            import time
            for _ in range(16):
                if os.fork() == 0:
                    hoard = torch.ones(2**26)
                    time.sleep(600)
                    os._exit(0)
            time.sleep(2)
        """),
    "pipes": text("""
            import fcntl
            hoard = []
            for _ in range(10000):
                hoard.append(os.pipe())
                fcntl.fcntl(hoard[-1][1], 1031, 2**20)
                os.write(hoard[-1][1], b'x' * 2**20)
        """),
    "sockets": text("""
            import socket
            hoard = []
            for _ in range(10000):
                a, b = socket.socketpair()
                a.setblocking(False)
                a.send(b'x' * 2**17)
                hoard += [a, b]
        """),
}


OWN_HARM = (
    "pipes",
    "sockets",
)  # the cell raises, and what it opened stays open


def _indented(cell: str) -> tuple[str, ...]:
    return tuple(cell.splitlines())


MEMORY = (
    *(
        ends("41", f"memory by {name}", *_indented(cell), outcomes=ZERO, expect=sandboxed(*ZERO))
        for name, cell in HUGE.items()
    ),
    *(
        cell_ends(
            "41",
            f"memory by {name}",
            cell,
            expect=sandboxed("wrong", "died", "memory") if name in OWN_HARM else sandboxed("wrong"),
            spares=() if name in OWN_HARM else ("01.3", "01.8"),
            fast=name in ("lists", "memfd"),
        )
        for name, cell in HUGE.items()
    ),
    cell_ends(
        "42",
        "64 workers",
        text("""
            import torch.multiprocessing as workers, time
            context = workers.get_context('fork')
            for _ in range(64):
                context.Process(target=time.sleep, args=(600,), daemon=False).start()
        """),
        expect=sandboxed(*ZERO),
        spares=(),  # they hold the memory that its own answers need
    ),
    cell_ends(
        "43",
        "fills the disk",
        text("""
            for place in ('.', '/tmp', '/var/tmp', '/dev/shm', os.path.expanduser('~')):
                for number in range(40):
                    try:
                        with open(os.path.join(place, f'{MARK}-{number}'), 'wb') as file:
                            for _ in range(8):
                                file.write(b'x' * 2**20)
                    except OSError as error:
                        print(error)
                        break
        """),
        expect=sandboxed("wrong"),
        fast=True,
    ),
    cell_ends(
        "43",
        "one huge file",
        text("""
            with open(MARK, 'wb') as file:
                for _ in range(4000):
                    file.write(b'x' * 2**20)
        """),
        expect=sandboxed("wrong"),
    ),
    cell_ends(
        "43",
        "a million small files",
        text("""
            for number in range(10**6):
                open(f'{MARK}-{number}', 'w').close()
        """),
        expect=sandboxed("wrong"),
    ),
    cell_ends(
        "44",
        "3 GB of print",
        text("""
        for _ in range(3000):
            print('x' * 10**6)
    """),
        fast=True,
    ),
    cell_ends(
        "44",
        "one line of 1 GB",
        text("""
            sys.stdout.write('x' * 10**9)
            sys.stdout.flush()
        """),
        expect=everywhere("wrong"),
    ),
    cell_ends(
        "44",
        "a gigabyte to the file itself",
        text("""
        for _ in range(1000):
            os.write(2, b'y' * 10**6)
    """),
    ),
    cell_ends(
        "44", "control characters", "print('\\x1b]0;title\\x07\\x1b[2J\\x1b[31mred\\r\\x08\\x00\\x9b31m\\u202e\\u2066')"
    ),
    ends(
        "44",
        "prints while it is judged",
        "for _ in range(3000):",
        "    print('x' * 10**6)",
        outcomes=("timeout", "wrong"),
    ),
    Attack(
        "45",
        "prints a score",
        (
            text("""
                import json, atexit
                print(json.dumps({'score': 100, 'outcome': 'right', 'points': 100, 'exercise': '01.2'}))
                print('ALL TESTS PASSED')
                atexit.register(print, '01.2 q_sample: right')
            """),
            body("print('01.2 q_sample: right')", 'os.write(1, b\'{"outcome": "right"}\\n\')', "return x0"),
        ),
        everywhere("wrong"),
        fast=True,
    ),
    cell_ends(
        "46",
        "writes results",
        text("""
            import json
            for place in ('.', '..', '/autograder/results', '/autograder', CANARY_TREE, HOME, REPO, '/tmp', '/'):
                for name in ('results.json', 'results.csv', 'ledger.sqlite', f'{MARK}.json'):
                    try:
                        path = os.path.join(place, name)
                        if place not in (HOME, REPO, '/', '/tmp', '..') or name.startswith(MARK):
                            open(path, 'w').write(json.dumps({'score': 100, 'tests': []}))
                    except OSError as error:
                        print(error)
        """),
        expect=sandboxed("wrong"),
        fast=True,
    ),
    cell_ends(
        "46",
        "wrecks a folder",
        text("""
            import shutil, glob
            for path in glob.glob(os.path.join(CANARY_TREE, '*')):
                for deed in (
                    lambda p: open(p, 'a').write('x'),
                    lambda p: os.truncate(p, 0),
                    lambda p: os.chmod(p, 0),
                    lambda p: os.utime(p, (0, 0)),
                    lambda p: os.setxattr(p, 'user.x', b'x'),
                    lambda p: os.rename(p, p + '.moved'),
                    lambda p: os.unlink(p),
                ):
                    try:
                        deed(path)
                    except OSError as error:
                        print(error)
            shutil.rmtree(CANARY_TREE, ignore_errors=True)
        """),
        expect=sandboxed("wrong"),
        fast=True,
    ),
    cell_ends(
        "47",
        "lifts its limits",
        text("""
            import resource, signal
            for limit in range(16):
                for value in ((-1, -1), (resource.getrlimit(limit)[1],) * 2):
                    try:
                        resource.setrlimit(limit, value)
                    except (OSError, ValueError) as error:
                        print(error)
            import ctypes
            libc = ctypes.CDLL(None)
            libc.prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
            for deed in (
                lambda: os.nice(-20),
                lambda: os.setsid(),
                lambda: os.setpgid(0, 0),
                lambda: os.sched_setaffinity(0, range(64)),
                lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99)),
                lambda: os.setuid(0),
                lambda: os.setgroups([0]),
            ):
                try:
                    deed()
                except OSError as error:
                    print(error)
            try:
                hoard = [torch.ones(2**26) for _ in range(16)]
            finally:
                hoard = None
        """),
        expect=sandboxed("wrong"),
    ),
    cell_ends(
        "47",
        "leaves its group and hangs",
        text("""
            try:
                os.setsid()
            except OSError:
                os.setpgid(0, 0)
            while True:
                pass
        """),
    ),
)

NETWORK = {
    "tcp": text("""
        with socket.create_connection(('127.0.0.1', PORT), timeout=1) as s:
            got = True
    """),
    "udp": text("""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            got = s.sendto(b'x', ('127.0.0.1', UDP_PORT)) == 1
    """),
    "tcp over IPv6": text("""
        with socket.socket(socket.AF_INET6) as s:
            s.settimeout(1)
            s.connect(('::ffff:127.0.0.1', PORT))
            got = True
    """),
    "an abstract unix socket": text("""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect('\\0' + ABSTRACT)
            got = True
    """),
    "a unix socket in a folder": text("""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(SOCKET_PATH)
            got = True
    """),
    "netlink": text("""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
            s.bind((0, 0))
            got = True
    """),
    "raw packets": text("""
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as s:
            got = True
    """),
    "vsock": text("""
        with socket.socket(40, socket.SOCK_STREAM) as s:
            got = True
    """),
    "packet socket": text("""
        with socket.socket(17, socket.SOCK_RAW, 0) as s:
            got = True
    """),
}

SYSTEM = {  # number of the system call on x86-64, arguments; success is a result that is not negative
    "io_uring": (425, "8, ctypes.byref(ctypes.create_string_buffer(256))"),
    "bpf": (
        321,
        "0, (ctypes.c_uint32 * 32)(2, 4, 8, 1), 128",  # BPF_MAP_CREATE
    ),
    "userfaultfd": (323, "1"),
    "perf events": (
        298,
        "ctypes.byref(ctypes.create_string_buffer(b'\\x01\\0\\0\\0\\x70\\0\\0\\0' + bytes(104))), 0, -1, -1, 0",
    ),
    "a key ring": (248, "b'user', b'condiff', b'x', 1, -2"),
    "open a tree of mounts": (428, "-100, b'/', 1"),
    "chroot": (161, "b'/'"),
    "a new mount namespace": (272, "0x00020000"),
    "kexec": (246, "0, 0, None, 0"),
    "the clock": (227, "0, ctypes.byref((ctypes.c_long * 2)(1, 1))"),
    "a module": (313, "-1, b'', 0"),
    "syslog": (103, "10, None, 0"),
    "open by handle": (304, "-100, None, 0"),
}

OUTSIDE = (
    *(
        prize(
            "48",
            name,
            "\n".join(
                [
                    "import socket",
                    "got = False",
                    "try:",
                    indent(deed, "    "),
                    "except OSError as error:",
                    "    print(error)",
                ]
            ),
            scoped=name == "an abstract unix socket",
            fast=name == "udp",
        )
        for name, deed in NETWORK.items()
    ),
    cell_ends(
        "48",
        "asks a name server",
        text("""
            import socket
            socket.setdefaulttimeout(1)
            socket.getaddrinfo('example.invalid', 80)
        """),
        expect=sandboxed("wrong"),
    ),
    prize(
        "49",
        "a new user namespace",
        SYSCALL
        + text("""
            pid = os.fork()  # a process with threads may not
            if pid == 0:
                os._exit(0 if libc.unshare(0x10000000) == 0 else 1)
            got = os.waitpid(pid, 0)[1] == 0
        """),
        fast=True,
    ),
    prize(
        "49",
        "a user namespace by clone",
        SYSCALL
        + text("""
            pid = libc.syscall(56, 0x10000000 | 17, None, None, None, None)
            if pid == 0:
                os._exit(0)
            if pid > 0:
                os.waitpid(pid, 0)
                got = True
        """),
    ),
    *(
        prize("50", name, SYSCALL + f"got = libc.syscall({number}, {args}) >= 0")
        for name, (number, args) in SYSTEM.items()
        if name not in ("kexec", "the clock", "a module", "open by handle")  # not tried on the machine itself
    ),
    prize(
        "50",
        "mount",
        SYSCALL
        + text("""
            os.makedirs('mounted', exist_ok=True)
            got = libc.mount(b'none', b'mounted', b'tmpfs', 0, None) == 0
            if got:
                libc.umount2(b'mounted', 2)
        """),
    ),
    *(
        Attack("50", name, (SYSCALL + f"got = libc.syscall({number}, {args}) >= 0", PRIZE), sandboxed(*LOST))
        for name, (number, args) in SYSTEM.items()
        if name in ("a module", "open by handle")
    ),
    prize(
        "51",
        "signals a process",
        text("""
            got = False
            try:
                os.kill(CANARY_PID, 0)
                got = True
            except OSError as error:
                print(error)
        """),
        fast=True,
    ),
    cell_ends(
        "51",
        "kills a process",
        text("""
            import signal
            for pid in (CANARY_PID, -CANARY_PID):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError as error:
                    print(error)
        """),
        expect=sandboxed("wrong"),
        fast=True,
    ),
    cell_ends(
        "51",
        "kills and stops all that it can",
        text("""
            import signal
            try:
                os.kill(CANARY_PID, 0)  # where this works the sandbox has failed: no further
            except OSError:
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for pid in (-1, os.getppid(), 1, 0):
                        try:
                            os.kill(pid, number)
                        except OSError as error:
                            print(error)
        """),
        expect=sandboxed("wrong"),
    ),
    Attack(
        "51",
        "kills its parents from the function",
        inside(
            "import signal",
            "try:",
            "    os.kill(CANARY_PID, 0)",
            "except OSError:",
            "    os.kill(os.getppid(), signal.SIGKILL)",
            "    os.kill(-1, signal.SIGKILL)",
        ),
        sandboxed(*ZERO),
        "the spare exercise after it needs the process that was killed: it is started again",
    ),
    prize(
        "51",
        "changes priority and limits of a process",
        text("""
            import resource
            got = False
            for deed in (
                lambda: os.setpriority(os.PRIO_PROCESS, CANARY_PID, 5),
                lambda: resource.prlimit(CANARY_PID, resource.RLIMIT_CORE, (0, 0)),
            ):
                try:
                    deed()
                    got = True
                except OSError as error:
                    print(error)
        """),
    ),
    prize("52", "may gain privileges", SYSCALL + "got = libc.prctl(39, 0, 0, 0, 0) == 0  # PR_GET_NO_NEW_PRIVS"),
    prize(
        "52",
        "su and sudo",
        text("""
            deed = "su -s /bin/sh -c 'cat /etc/shadow' root </dev/null; sudo -n cat /etc/shadow"
            out = subprocess.run(deed, shell=True, capture_output=True)
            got = b'root:' in out.stdout
        """),
    ),
    prize(
        "52",
        "capabilities",
        text("""
            import re
            got = True
            try:
                got = int(re.search('CapEff:\\\\s*(\\\\w+)', open('/proc/self/status').read())[1], 16) & ~4 != 0
            except OSError:
                got = False
        """),
        about="CAP_DAC_READ_SEARCH may stay at L1, where the interpreter needs it: Landlock says what can be read",
    ),
)

X86 = platform.machine() == "x86_64"  # the numbers of system calls above are its own
RECORDS = tuple(
    attack for attack in (*READING, *ENDING, *MEMORY, *OUTSIDE) if X86 or "libc.syscall(" not in "".join(attack.cells)
)

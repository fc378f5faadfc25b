"""What a submission may try against the sandbox, tried at each level that this machine has. Nothing here is a mock."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from condiff_check.agent import lockdown
from condiff_check.agent.watch import _state, descendants
from condiff_check.grading import sandbox as module
from condiff_check.grading.probing import probing_view
from condiff_check.grading.sandbox import LEVELS, Limits, Sandbox, SandboxError, choose, clean, probe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="the sandbox needs a POSIX system")]
LINUX = sys.platform == "linux"
MINOR = sys.version_info.minor
SMALL = Limits(memory=192 << 20, processes=24, disk=8 << 20, output=8 << 10)
CONFINED = ("L1", "L2")
HOARD = "block = bytearray(b'x') * (100 << 20); time.sleep(60)"
RUNNER = """
import ctypes, json, mmap, os, signal, socket, sys, time
def warm_up():
    pass
def main(control):
    lines = control.makefile("rb")
    while line := lines.readline():
        scope = {"__name__": "submission", **globals()}
        try:
            exec(json.loads(line), scope)
            answer = {"value": scope.get("answer")}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        control.sendall(json.dumps(answer).encode() + b"\\n")
"""


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = probing_view(tmp_path_factory.mktemp("course") / "view")
    (folder / "condiff_agent" / "runner.py").write_text(RUNNER)
    return folder


@pytest.fixture(scope="module")
def sandboxes(view):
    """One for each level, started when it is first asked for."""
    before, mounts = set(descendants(os.getpid())), _mounts()
    started = {}

    def get(level):
        if level not in started:
            started[level] = _start(view, level)
        return started[level]

    yield get
    for one in started.values():
        one.close()
    assert set(descendants(os.getpid())) <= before
    assert _mounts() == mounts
    assert not any(one._base.exists() for one in started.values())


def _start(view, level, **options):
    try:
        return Sandbox(view, level, SMALL, preload=False, **options)
    except SandboxError as error:
        pytest.skip(f"no {level} here: {error}")


def _mounts():
    return Path("/proc/self/mountinfo").read_text().count("\n") if LINUX else 0


@pytest.fixture(params=LEVELS)
def sandbox(request, sandboxes):
    return sandboxes(request.param)


@pytest.fixture(params=CONFINED)
def confined(request, sandboxes):
    return sandboxes(request.param)


def run(child, code, seconds=5.0):
    """Run code in the child; its `answer`, or OSError: what it raised, "it ended", or no answer in time."""
    with contextlib.suppress(OSError):
        child.control.sendall(json.dumps(code).encode() + b"\n")
    child.control.settimeout(seconds)
    try:
        line = child.control.makefile("rb").readline()
    except TimeoutError:
        raise
    except OSError:
        line = b""
    if not line:
        raise OSError("it ended")
    answer = json.loads(line)
    if "error" in answer:
        raise OSError(answer["error"])
    return answer["value"]


def end(child, seconds=3.0):
    deadline = time.monotonic() + seconds
    while child.exit() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = child.exit()
    child.kill()
    return ended


def test_a_level_keeps_what_it_promises(sandbox):
    found = probe(sandbox.level)
    assert [one for one in found.values() if not one.works] == []
    assert len(found) > (20 if sandbox.level != "P0" else 8)


def _open_python():
    """An interpreter of this version that every user may run, and its folders: this one may lie in a closed folder."""
    names = (os.path.realpath(sys.executable), f"/usr/local/bin/python3.{MINOR}", f"/usr/bin/python3.{MINOR}")
    folders = [str(Path(module.__file__).parents[2]), *(p for p in sys.path if Path(p).name == "site-packages")]
    names = [name for name in names if Path(name).exists() and _open_to_all(name)]
    return (names[0], folders) if names and all(map(_open_to_all, folders)) else (None, [])


def _open_to_all(path):
    return all(p.stat().st_mode & 0o005 == 0o005 for p in (Path(path), *Path(path).parents))


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("level", LEVELS)
def test_an_ordinary_user_gets_the_same(level, tmp_path):
    python, folders = _open_python()
    if python is None:
        pytest.skip("no interpreter that an ordinary user can run")
    code = (
        f"import sys, json; sys.path += {folders!r}; from condiff_check.grading.sandbox import probe; "
        f"print(json.dumps([[one.name, one.works, one.detail] for one in probe({level!r}).values()]))"
    )
    home = Path("/var/tmp") / f"condiff-test-{os.getpid()}"
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    try:
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        line = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", python, "-c", code]
        done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=home, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        left = list(home.glob("condiff-*"))
    finally:
        shutil.rmtree(home)
    if found[0][0] == "starts":
        pytest.skip(f"no {level} for an ordinary user: {found[0][2]}")
    assert [one for one in found if not one[1]] == []
    assert left == []


def test_no_way_leads_to_a_file_outside(confined, tmp_path):
    secret = tmp_path / "answers.txt"
    secret.write_text("sings")
    tmp_path.chmod(0o777)
    code = f"""
path, answer = {str(secret)!r}, []
os.symlink(path, "link")
def hard(): os.link(path, "hard"); return "hard"
ways = [path, "link", "/proc/self/root" + path, "/proc/1/root" + path, "/proc/self/cwd/.." + path, "../" * 9 + path,
        f"/proc/{{os.getppid()}}/root" + path]
for way in [*ways, hard]:
    try:
        answer.append(open(way() if callable(way) else way).read())
    except OSError:
        pass
for number in range(256):
    try:
        answer.append(os.read(os.open("answers.txt", os.O_RDONLY, dir_fd=number), 10).decode())
    except OSError:
        pass
"""
    child = confined.spawn()
    assert run(child, code) == []
    child.kill()


def test_what_of_this_course_is_installed_is_hidden(confined, view, tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    (packages / "condiff_check").mkdir(parents=True)
    (packages / "condiff_check" / "facts.py").write_text("sings")
    (packages / "condiff_extra.py").write_text("sings")
    (packages / "innocent.py").write_text("value = 4")
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    with _start(view, confined.level) as sandbox:
        child = sandbox.spawn()
        assert run(child, "import innocent; answer = innocent.value") == 4
        place = f"place = os.path.dirname(__import__('innocent').__file__) or {str(packages)!r}\n"
        for name in ("condiff_check/facts.py", "condiff_extra.py"):
            with contextlib.suppress(OSError):
                assert run(child, f"{place}answer = open(f'{{place}}/{name}').read()") == ""


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK", "AF_PACKET", "AF_ALG"])
def test_no_socket_of_any_kind(confined, family):
    if not hasattr(socket, family):
        pytest.skip("not on this platform")
    child = confined.spawn()
    for kind in ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW"):
        with pytest.raises(OSError, match=r"PermissionError: \[Errno 1\]"):
            run(child, f"socket.socket(socket.{family}, socket.{kind})")
    child.kill()


def test_the_zygote_cannot_be_reached(confined):
    zygote = confined._zygote._process.pid
    child = confined.spawn()
    code = """
answer = []
for target in {os.getppid(), PID} - {0}:
    try:
        os.kill(target, signal.SIGKILL); answer.append(target)
    except OSError: pass
    for name in ("environ", "mem", "maps", "fd/0"):
        try:
            open(f"/proc/{target}/{name}", "rb").read(1); answer.append((target, name))
        except OSError: pass
"""
    assert run(child, code.replace("PID", str(zygote))) == []
    child.kill()
    assert confined._zygote.alive()


def test_it_holds_no_privilege_that_opens_anything(confined):
    child = confined.spawn()
    calls = "answer = [ctypes.CDLL(None, use_errno=True).{} for _ in (1,)]"
    assert run(child, calls.format("setuid(0)")) == [-1]
    assert run(child, calls.format("chroot(b'/')")) == [-1]
    assert run(child, calls.format("mount(b'tmpfs', b'/usr', b'tmpfs', 0, 0)")) == [-1]
    assert run(child, calls.format("umount2(b'/proc', 2)")) == [-1]
    assert run(child, calls.format("syscall(435, 0, 0)")) == [-1]  # clone3: threads then take clone
    run(child, "import threading; t = threading.Thread(target=int); t.start(); t.join()")
    assert run(child, "answer = os.system('su -c true 2>/dev/null') != 0")
    child.kill()


@pytest.mark.parametrize(
    "bomb",
    [
        "block = [0]\nwhile True: block += block[:1 << 20]",
        "blocks = []\nwhile True: blocks.append(bytearray(b'x') * (1 << 20))",
        f"for _ in range(8):\n    if not os.fork():\n        {HOARD}\ntime.sleep(60)",
        "if not os.fork():\n    os.setsid()\n    for _ in range(4):\n        if not os.fork():\n"
        f"            {HOARD}\n    time.sleep(60)\ntime.sleep(60)",
        # pages of a shared mapping stay when no process has them mapped in
        "for _ in range(4):\n    if not os.fork():\n        m = mmap.mmap(-1, 150 << 20)\n"
        "        while True:\n            for at in range(0, len(m), 4096): m[at] = 1\n"
        "            m.madvise(mmap.MADV_DONTNEED)\ntime.sleep(60)",
    ],
    ids=["list", "bytes", "processes", "daemons", "shared mapping"],
)
@pytest.mark.skipif(not LINUX, reason="the watchdog reads /proc")
def test_memory_is_bounded(sandbox, bomb):
    child = sandbox.spawn()
    start = time.monotonic()
    try:
        with pytest.raises(OSError, match=r"MemoryError|it ended"):
            run(child, bomb, seconds=10)
    finally:
        child.kill()
    assert child.exit() in ("memory", "killed")
    assert time.monotonic() - start < 10


@pytest.mark.skipif(not LINUX, reason="macOS does not set this limit")
def test_one_request_for_too_much_is_an_error_and_not_the_end(sandbox):
    child = sandbox.spawn()
    with pytest.raises(OSError, match="MemoryError"):
        run(child, "bytearray(1 << 30)")
    assert run(child, "answer = 1") == 1
    child.kill()


def test_memory_that_no_process_maps_is_refused(confined):
    child = confined.spawn()
    with pytest.raises(OSError, match="PermissionError"):
        run(child, "os.memfd_create('x')")
    child.kill()


def test_a_fork_bomb_is_bounded_and_ends(confined):
    child = confined.spawn()
    bomb = "while True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.001)"
    with pytest.raises((OSError, TimeoutError)):
        run(child, bomb, seconds=0.7)
    living = len(descendants(confined._zygote._process.pid))
    start = time.monotonic()
    child.kill()
    assert time.monotonic() - start < 2.0
    assert living <= 2 * SMALL.processes + 3
    assert len(descendants(confined._zygote._process.pid)) <= 3
    assert run(confined.spawn(), "answer = 'well'") == "well"


def test_small_files_fill_nothing(confined):
    child = confined.spawn()
    with contextlib.suppress(OSError):
        run(child, "for n in range(200_000): open(f'{n}', 'w').close()", seconds=15)
    assert len(list(confined._work.iterdir())) < 40_000
    child.kill()
    assert list(confined._work.iterdir()) == []


def test_a_daemon_does_not_outlive_its_submission(sandbox):
    code = """
left, right = socket.socketpair()
if not os.fork():
    os.setsid()
    if not os.fork():
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        os.write(right.fileno(), b"x")
        while True: time.sleep(60)
    os._exit(0)
os.wait(); left.recv(1)
os._exit(0)
"""
    child = sandbox.spawn()
    with pytest.raises(OSError, match="it ended"):
        run(child, code)
    assert end(child) == "exit 0"
    assert set(descendants(sandbox._zygote._process.pid)) <= set(_bubblewraps(sandbox))


def _bubblewraps(sandbox):
    """At L2 three processes are below what was started: bubblewrap's, one that waits, and the zygote."""
    return descendants(sandbox._zygote._process.pid)[:3] if sandbox.level == "L2" else []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os._exit(3)", ["exit 3"]),
        ("ctypes.string_at(0)", ["signal 11"]),
        ("os.abort()", ["signal 6", "signal 11"]),  # the first process of a pid namespace ignores its own SIGABRT
        ("sys.exit(4)", ["exit 1"]),  # the runner's to catch; this one does not
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 60, 1 << 60))", [None]),
    ],
)
def test_every_end_has_a_name(sandbox, code, expected):
    if "RLIMIT" in code and not sandbox._slot:
        expected = [None]
    child = sandbox.spawn()
    with pytest.raises(OSError, match=r"it ended|Error"):
        run(child, code)
    if expected != [None]:
        assert end(child) in expected
    child.kill()


def test_what_does_not_end_is_killed(sandbox):
    child = sandbox.spawn()
    code = """
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    try: time.sleep(1e6)
    except BaseException: pass
"""
    with pytest.raises(TimeoutError):
        run(child, code, seconds=0.3)
    assert child.exit() is None
    start = time.monotonic()
    child.kill()
    child.kill()
    assert time.monotonic() - start < 2.0
    assert child.exit() == "killed"
    assert run(sandbox.spawn(), "answer = os.listdir()") == []


def test_a_flood_of_print_stays_small(sandbox):
    import resource

    child = sandbox.spawn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(child, "os.write(1, b'first\\n')\nfor _ in range(3200): os.write(1, b'a' * 65536)\nos.write(1, b'\\nlast')", 30)
    child.kill()
    assert child.output.startswith("first\na")
    assert child.output.endswith("a\nlast")
    assert "bytes left out" in child.output
    assert len(child.output) < 2 * SMALL.output
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (32 << 10 if LINUX else 32 << 20)


def test_text_is_cleaned():
    dirty = "\x1b[31mred\x1b[0m\r\nnext\rover\x07\x00 \x1b]0;title\x07done \u202egnp\u2066 \x9b2J \x1b(B\tβ"
    assert clean(dirty) == "red\nnext\nover done gnp 2J \tβ"
    assert clean("a" * 10 + "\x1b") == "a" * 10


def test_children_share_nothing(sandbox):
    child = sandbox.spawn()
    deep = """
import tempfile
open("note", "w").write("x"); tempfile.mkdtemp()
for _ in range(1100):
    os.mkdir("d"); os.chdir("d")
"""
    run(child, deep)
    run(child, "os.mkdir('closed'); open('closed/x', 'w').close(); os.chmod('closed', 0)")
    child.kill()
    child = sandbox.spawn()
    assert run(child, "import tempfile; answer = os.listdir() + os.listdir(tempfile.gettempdir())") == []
    child.kill()


def test_it_sees_only_the_environment_that_it_should(sandbox, monkeypatch):
    monkeypatch.setenv("COURSE_SECRET", "sings")
    child = sandbox.spawn()
    names = run(child, "answer = sorted(os.environ)")
    assert set(names) <= {
        *("CONDIFF_BUDGET", "HOME", "LANG", "LC_CTYPE", "MPLBACKEND", "OMP_NUM_THREADS", "PATH", "TMPDIR"),
        "TORCHDYNAMO_DISABLE",
    }
    assert run(child, "answer = sorted(int(n) for n in os.listdir('/dev/fd'))") in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert run(child, "answer = sys.stdin.read()") == ""
    child.kill()


def test_a_dead_zygote_is_replaced(sandbox):
    child = sandbox.spawn()
    assert run(child, "answer = 1") == 1
    sandbox._zygote._process.kill()
    assert end(child) == "killed"
    assert run(sandbox.spawn(), "answer = 2") == 2


@pytest.mark.skipif(not LINUX, reason="finds processes through /proc")
def test_a_zygote_that_hangs_is_killed_with_all_below(sandbox):
    child = sandbox.spawn()
    run(child, "os.fork() or time.sleep(60)")
    pid = sandbox._zygote._process.pid
    everyone = [pid, *descendants(pid)]
    for one in everyone:
        os.kill(one, signal.SIGSTOP)
    start = time.monotonic()
    child.kill()
    assert time.monotonic() - start < 3.0  # 2, and what a busy machine adds
    time.sleep(0.2)
    assert [one for one in everyone if _state(one) not in "ZX"] == []
    assert run(sandbox.spawn(), "answer = 3") == 3


def test_paranoid_means_a_fresh_interpreter(view):
    level = next(one for one in LEVELS[::-1] if "starts" not in probe(one))
    with _start(view, level, paranoid=True) as sandbox:
        pids = []
        for _ in range(2):
            child = sandbox.spawn()
            pids.append(sandbox._zygote._process.pid)
            child.kill()
    assert len(set(pids)) == 2


def test_two_sandboxes_do_not_meet(view, confined):
    with _start(view, confined.level) as other:
        here, there = confined.spawn(), other.spawn()
        run(here, "open('note', 'w').write('x')")
        assert run(there, "answer = os.listdir()") == []
        if os.geteuid() == 0:
            assert confined._slot.uid != other._slot.uid
        here.kill()
        there.kill()


def test_the_layers_say_what_was_on(sandbox):
    layers = " ".join(sandbox.layers)
    assert ("seccomp" in layers) == (sandbox.level != "P0")
    assert ("pid namespace" in layers) == (sandbox.level == "L2")
    assert "rlimits" in layers


def test_torch_and_pictures_work_in_a_warm_child(view):
    """At the highest level that there is, with the limits that grading has."""
    level = next(one for one in LEVELS[::-1] if "starts" not in probe(one))
    with Sandbox(view, level) as sandbox:
        child = sandbox.spawn()
        code = """
import torch, matplotlib.pyplot as plt
x = torch.randn(64, 3, 8, 8, requires_grad=True)
torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3)).square().mean().backward()
figure = plt.figure(); plt.plot([1, 2]); plt.savefig("picture.png")
answer = [torch.get_num_threads(), os.path.getsize("picture.png") > 1000, len(os.listdir("/proc/self/task"))]
"""
        assert run(child, code) == [1, True, 1]
        assert run(child, "import tempfile, tqdm, IPython\nanswer = tempfile.TemporaryFile().write(b'abc')") == 3
        with pytest.raises(OSError, match=r"RuntimeError|it ended"):
            run(child, "import torch\nkept = []\nwhile True: kept.append(torch.ones(1 << 24))", seconds=20)
        child.kill()
        assert child.exit() in ("memory", "killed")
        child = sandbox.spawn()
        hoard = "kept = torch.ones(200 << 20); time.sleep(60)"
        bomb = f"import torch\nfor _ in range(6):\n    if not os.fork():\n        {hoard}\ntime.sleep(60)"
        with pytest.raises(OSError, match="it ended"):
            run(child, bomb, seconds=20)
        assert end(child) == "memory"


def test_choosing_a_level(monkeypatch):
    with pytest.raises(SandboxError, match="a level is one of"):
        choose("L7")
    with pytest.raises(SandboxError, match="less than L2"):
        choose("P0", required="L2")
    assert choose("P0") == "P0"
    monkeypatch.setattr(module, "probe", probe.__wrapped__)
    monkeypatch.setenv("PATH", "/nowhere")
    if LINUX:
        with pytest.raises(SandboxError, match="apt install bubblewrap"):
            choose("L2")


def test_the_filter_knows_its_machines():
    with pytest.raises(OSError, match="no seccomp filter for vax"):
        lockdown.seccomp_filter("vax")
    assert len({lockdown.seccomp_filter(m, signals=s) for m in ("x86_64", "aarch64") for s in (True, False)}) == 4

"""Many submissions through worker processes that may die: tasks go in as bytes, results come back as text.

A worker is a process of its own, with a judge and its sandboxes in it. What it says is JSON over a socket of its own,
never a pickle: a process pool of the usual kind shares one pipe of pickles among its workers, so that one killed in the
middle of a message spoils the batch.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Protocol

from filelock import FileLock, Timeout

from .intake import Unreadable, read_limited
from .results import Graded, Verdict, from_json, to_json

WORKER = "condiff_check.grading.batch:Worker"
PREFIX = "condiff-grade-"
START_SECONDS = 300.0  # to import torch on a machine that is very busy
SANDBOXES = 3  # per worker
GOODBYE = 5.0  # seconds that a worker has to close its sandboxes
DAY = 24 * 3600.0
REPLY = 64 << 20  # bytes that a worker may answer with
SERVE = "import sys; from condiff_check.grading.batch import serve; serve(int(sys.argv[1]))"
# Files that no verdict depends on: with a new one of the others everything is graded anew.
AROUND = ("batch", "cluster", "commands", "discover", "feedback", "gradescope", "ledger", "listing", "nbgrader_scores")
AROUND += ("report_html", "roster", "rubric", "selfcheck", "tables")


class BatchError(RuntimeError):
    """The batch cannot go on; the message says why and what to do."""


class _Lost(Exception):
    """A worker died or hung over a submission."""


@dataclass(frozen=True)
class Task:
    """A submission to grade. Without `only`, all exercises of the lesson; without a lesson, the one it is found for."""

    submission: str
    student: str
    lesson: str | None
    file: str
    sha256: str
    only: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What all workers of a batch agree on.

    `probed`: that level has been tried out on this machine. `trusted`: submissions may run without a sandbox.
    """

    secret: str  # hexadecimal
    sandbox: str = "auto"
    required: str | None = None
    probed: bool = False
    paranoid: bool = False
    trusted: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    memory: int = 32 << 30  # bytes of address space for the worker itself; torch alone reserves some
    worker: str = WORKER


Read = Callable[[Task], bytes]


class Engine(Protocol):
    """What grades tasks: the processes of this machine, or a cluster."""

    def run(self, tasks: Iterable[Task], read: Read) -> Iterator[Graded]:
        """Grade the tasks; results come as they are ready. `read` is asked for the bytes of a task when it is due."""


# --- versions ---------------------------------------------------------------------------------------------------------


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """What a result depends on besides the submission: of the exercises and the grader, hashes of their source."""
    package = Path(__file__).parents[1]
    reference = package.parent / "condiff_ref"
    grader = [p for p in (*package.glob("grading/*.py"), *package.glob("agent/*.py")) if p.stem not in AROUND]
    return (
        ("condiff", _version("condiff")),
        ("exercises", _hash([p for p in (*package.glob("*.py"), *reference.glob("*.py")) if p.stem != "cli"])),
        ("grader", _hash(grader)),
        ("python", ".".join(map(str, sys.version_info[:3]))),
        ("torch", _version("torch")),
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _hash(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_bytes()
        found.update(f"{path.parent.name}/{path.name} {len(text)}\n".encode() + text)
    return found.hexdigest()[:16]


def secret_id(secret: str) -> str:
    """Which secret it was, without giving it away."""
    return hashlib.sha256(b"condiff-grade: the name of a secret\n" + secret.encode()).hexdigest()[:12]


# --- verdicts that need no judge --------------------------------------------------------------------------------------


def without_judge(task: Task, lesson: str | None, status: str, reason: str, notes: Sequence[str] = ()) -> Graded:
    """All that was asked for with one outcome, "unreadable" or "grader error"."""
    from ..registry import lesson as exercises_of
    from ..registry import lessons

    known = exercises_of(lesson) if lesson in lessons() else ()
    asked = [one for one in known if task.only is None or one.id in task.only]
    verdicts = tuple(Verdict(one.id, one.names, status, 0.0, float(one.points), reason) for one in asked)
    return Graded(
        task.submission,
        task.student,
        lesson or "",
        task.file,
        task.sha256,
        status,
        verdicts,
        notes=(*task.notes, *notes, *(() if verdicts else (reason,))),
        versions=versions(),
        graded_at=now(),
    )


def now() -> str:
    """This moment, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- in the worker ----------------------------------------------------------------------------------------------------


class Worker:
    """A judge with a sandbox per lesson, made when the first submission for it comes. Files go into `folder`."""

    def __init__(self, settings: Settings, folder: Path):
        from . import judge, sandbox

        self.settings, self._folder = settings, folder
        self._judge = judge.Judge
        self._limits = sandbox.Limits(**settings.limits)
        self._level = settings.sandbox if settings.probed else sandbox.choose(settings.sandbox, settings.required)
        if self._level == "P0" and not settings.trusted:
            raise BatchError(
                "P0 keeps no submission from reading the files of this machine, and --trust-submissions was not given; "
                "condiff-grade --probe says what is missing for more"
            )
        self._sandboxes: dict[str, Any] = {}

    def grade(self, task: Task, data: bytes) -> Graded:
        """The verdicts on these bytes."""
        start = time.monotonic()
        try:
            notebook = read_limited(data)
        except Unreadable as error:
            status = "grader error" if error.ours else "unreadable"
            return without_judge(task, task.lesson, status, str(error))
        lesson = task.lesson or notebook.lesson
        if lesson is None:
            return without_judge(task, None, "unreadable", "no exercise of the course in it: which lesson is it for?")
        notes = list(task.notes)
        if notebook.lesson not in (None, lesson):
            notes.append(f"it looks like lesson {notebook.lesson}, and is graded as lesson {lesson}")
        sandbox = self._sandbox(lesson)
        judge = self._judge(sandbox, bytes.fromhex(self.settings.secret), self._limits)
        verdicts, cells, found = judge.grade(notebook, lesson, task.only)
        failed = any(verdict.outcome == "grader error" for verdict in verdicts)
        return Graded(
            task.submission,
            task.student,
            lesson,
            task.file,
            task.sha256,
            "grader error" if failed else "graded",
            tuple(verdicts),
            tuple(cells),
            (*notes, *(note for note in found if note not in notes)),
            output=getattr(judge, "output", ""),
            level=sandbox.level,
            layers=tuple(sandbox.layers),
            versions=versions(),
            key=secret_id(self.settings.secret),
            seconds=round(time.monotonic() - start, 3),
            graded_at=now(),
        )

    def close(self) -> None:
        """End the sandboxes."""
        while self._sandboxes:
            self._sandboxes.popitem()[1].__exit__(None, None, None)

    def _sandbox(self, lesson: str) -> Any:
        """The lesson's sandbox. Each holds torch, a quarter of a gigabyte: the one unused for longest makes room."""
        from . import redact, sandbox

        if (made := self._sandboxes.pop(lesson, None)) is None:
            if len(self._sandboxes) >= SANDBOXES:
                self._sandboxes.pop(next(iter(self._sandboxes))).__exit__(None, None, None)
            view = self._folder / f"view-{lesson}"
            if not view.exists():
                redact.build_view(lesson, view)
            made = sandbox.Sandbox(view, self._level, self._limits, self.settings.paranoid).__enter__()
        self._sandboxes[lesson] = made
        return made


def serve(descriptor: int) -> None:
    """The life of a worker process: settings, then task after task, until the other end is gone."""
    connection = Connection(descriptor)
    said = json.loads(connection.recv_bytes())
    settings, folder = Settings(**said["settings"]), Path(said["folder"])
    tempfile.tempdir = str(folder)  # so that whatever ends this process, what its sandboxes leave goes with the folder
    started: list[Any] = []
    watch = threading.Thread(target=_end_with, args=(descriptor, started, folder), daemon=True)
    watch.start()
    with contextlib.suppress(EOFError, ConnectionError):
        _work(connection, settings, folder, started)
    watch.join()


def _work(connection: Connection, settings: Settings, folder: Path, started: list[Any]) -> None:
    try:
        module, _, name = settings.worker.partition(":")
        worker = getattr(importlib.import_module(module), name)(settings, folder)
    except Exception as error:
        connection.send_bytes(json.dumps({"failed": f"{error}" or type(error).__name__}).encode())
        return
    started.append(worker)
    _limit_memory(settings.memory)
    connection.send_bytes(b"{}")
    while True:
        task = _task(json.loads(connection.recv_bytes()))
        data = connection.recv_bytes()
        try:
            if hashlib.sha256(data).hexdigest() != task.sha256:
                raise BatchError("the file changed while it was graded")
            reply = to_json(worker.grade(task, data))
        except Exception as error:
            connection.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            worker.close()
            raise BatchError("a fresh worker takes the next one") from error
        connection.send_bytes(reply.encode())


def _end_with(descriptor: int, started: Sequence[Any], folder: Path) -> None:
    """Leave nothing behind when the batch's own process is killed."""
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))  # POLLHUP comes without asking
    while not poll.poll():
        pass
    signal.alarm(10)
    with contextlib.suppress(Exception):
        for worker in started:
            worker.close()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError, Timeout):
        if (lock := folder.parent / "lock").exists():
            with FileLock(lock, timeout=0.5, poll_interval=0.02):  # the batch's own process is gone
                if list(folder.parent.iterdir()) == [lock]:  # and this is the last worker
                    lock.unlink()
        folder.parent.rmdir()
    os.killpg(0, signal.SIGKILL)


def _limit_memory(size: int) -> None:
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
    except (ImportError, ValueError, OSError):  # not on Windows, not on macOS
        pass


def _task(data: dict[str, Any]) -> Task:
    only = data.pop("only")
    return Task(**data | {"notes": tuple(data["notes"])}, only=None if only is None else tuple(only))


# --- beside the worker ------------------------------------------------------------------------------------------------


class Slot:
    """A place for a worker process. One that dies, or is still at it after `deadline(task)` seconds, is replaced and
    its submission tried once more; then that is a grader error."""

    def __init__(self, settings: Settings, folder: Path, deadline: Callable[[Task], float]):
        self._settings, self._folder, self._deadline = settings, folder, deadline
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._errors: BinaryIO | None = None
        self._stopped = False

    def grade(self, task: Task, data: bytes) -> Graded:
        """Raises BatchError where no worker can be started at all."""
        reason = ""
        for _ in range(2):
            try:
                return self._ask(task, data)
            except _Lost as error:
                self._kill()
                reason = str(error)
                if self._stopped:
                    raise BatchError("stopped") from None
        return without_judge(task, task.lesson, "grader error", f"the grader failed twice on it: {reason}")

    def stop(self) -> None:
        """End the worker, even in the middle of a task."""
        self._stopped = True
        self._kill()

    def _ask(self, task: Task, data: bytes) -> Graded:
        if self._process is None and not self._stopped:
            self._start()
        if self._stopped:
            raise _Lost("stopped")
        seconds = self._deadline(task)
        head = json.dumps(dataclasses.asdict(task)).encode()
        reply = self._exchange([head, data], seconds)
        try:
            if "error" in (said := json.loads(reply)):
                raise _Lost(str(said["error"])[:500])
            graded = from_json(reply)
        except (ValueError, TypeError, KeyError) as error:
            raise _Lost(f"its answer makes no sense: {error}") from error
        if graded.submission != task.submission or graded.sha256 != task.sha256:
            raise _Lost("it answered for another submission")
        return graded

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._folder.mkdir(exist_ok=True)  # the last worker before may have taken it along
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        folder = tempfile.mkdtemp(prefix="worker-", dir=self._folder)
        os.chmod(folder, 0o711)  # a child of another user id must get to its own folder below
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # one worker per core, and the same sums on each machine
        with theirs:
            # -P: a file torch.py in the folder where the batch is started stays out of it
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                env=environment,
                start_new_session=True,
            )
        first = {"settings": dataclasses.asdict(self._settings), "folder": folder}
        try:
            said = json.loads(self._exchange([json.dumps(first).encode()], START_SECONDS))
        except _Lost as error:
            self._kill()
            raise BatchError("stopped" if self._stopped else f"a worker does not start: {error}") from None
        if "failed" in said:
            self._kill()
            raise BatchError(str(said["failed"]))

    def _exchange(self, messages: Sequence[bytes], seconds: float) -> bytes:
        connection, process, late = self._connection, self._process, threading.Event()

        def end() -> None:
            late.set()
            _kill_group(process)

        clock = threading.Timer(seconds, end)
        clock.daemon = True
        clock.start()
        try:
            for message in messages:
                connection.send_bytes(message)
            return connection.recv_bytes(REPLY)
        except (EOFError, OSError):
            if late.is_set():
                raise _Lost(f"no end after {seconds:.0f} s") from None
            raise _Lost(self._death()) from None
        finally:
            clock.cancel()

    def _death(self) -> str:
        """How the worker ended, and its last words."""
        try:
            code = self._process.wait(timeout=5)
        except (subprocess.TimeoutExpired, AttributeError):
            return "it is gone"
        how = f"ended by signal {-code}" if code < 0 else f"exit {code}"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            return f"{how}: {lines[-1][:300]}" if lines else how
        return how

    def _kill(self) -> None:
        process, self._process = self._process, None
        if self._connection is not None:
            with contextlib.suppress(OSError):
                _hang_up(self._connection)  # the order to clear up and leave
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GOODBYE)
            _kill_group(process)
            process.wait()
        for file in (self._connection, self._errors):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


def _hang_up(connection: Connection) -> None:
    """Closing alone would not be noticed while another thread still reads from it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def default_deadline(limits: Mapping[str, float]) -> Callable[[Task], float]:
    """Seconds after which a worker cannot be in order any more: all its own limits, one after the other, and again."""

    def deadline(task: Task) -> float:
        from ..registry import lesson as exercises_of
        from ..registry import lessons

        known = exercises_of(task.lesson) if task.lesson in lessons() else ()
        return 120.0 + 4 * float(limits.get("notebook_seconds", 60.0)) + 4 * sum(one.seconds for one in known)

    return deadline


class Local:
    """The engine on this machine: `workers` processes, made when they are needed. A context manager."""

    def __init__(self, settings: Settings, workers: int, deadline: Callable[[Task], float] | None = None):
        self._settings, self._workers = settings, max(1, workers)
        self._deadline = deadline or default_deadline(settings.limits)

    def __enter__(self) -> "Local":
        if os.name != "posix":
            raise BatchError("grading needs Linux, or macOS with less isolation; on Windows run it in WSL2")
        sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = FileLock(self._folder / "lock")
        self._lock.acquire(timeout=0)
        self._folder.chmod(0o755)  # a sandbox may look into its view as another user
        self._slots = [Slot(self._settings, self._folder, self._deadline) for _ in range(self._workers)]
        self._idle: SimpleQueue[Slot] = SimpleQueue()
        for slot in reversed(self._slots):
            self._idle.put(slot)
        self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with ThreadPoolExecutor(self._workers) as stopping:
            list(stopping.map(Slot.stop, self._slots))
        self._pool.shutdown(wait=True)
        for slot in self._slots:
            slot.stop()  # one that was being started
        self._lock.release()
        remove(self._folder)

    def run(self, tasks: Iterable[Task], read: Read) -> Iterator[Graded]:
        """Grade the tasks; results come as they are ready."""

        def one(task: Task) -> Graded:
            slot = self._idle.get()
            try:
                return grade_read(slot, task, read)
            finally:
                self._idle.put(slot)

        yield from windowed((lambda task=task: self._pool.submit(one, task) for task in tasks), 2 * self._workers)


def remove(folder: Path) -> None:
    """A folder in which students' code may have closed some folders."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for tidy in (["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
            subprocess.run([*tidy, folder], capture_output=True, check=False)


def sweep() -> None:
    """Remove what earlier runs of this account left in the folder for temporary files, when they were killed."""
    root = Path(tempfile.gettempdir())
    for folder in [*root.glob(f"{PREFIX}*"), *root.glob("condiff-????????")]:
        with contextlib.suppress(OSError, Timeout):
            about = folder.lstat()
            age = time.time() - about.st_mtime
            if about.st_uid != os.geteuid() or not stat.S_ISDIR(about.st_mode) or age < 60:
                continue
            lock = folder / "lock"
            if lock.exists():
                with FileLock(lock, timeout=0):  # the one who made the folder holds it
                    pass
            elif age < DAY or not {one.name for one in folder.iterdir()} <= {"work"}:
                continue
            remove(folder)


def grade_read(slot: Slot, task: Task, read: Read) -> Graded:
    """Grade a task with the bytes that `read` has for it."""
    data = read_or_not(task, read)
    return data if isinstance(data, Graded) else slot.grade(task, data)


def read_or_not(task: Task, read: Read) -> bytes | Graded:
    """The bytes of a task, or what became of it without them."""
    try:
        return read(task)
    except Unreadable as error:
        return without_judge(task, task.lesson, "grader error" if error.ours else "unreadable", str(error))
    except OSError as error:
        reason = f"the file cannot be read: {error.strerror or error}"
        return without_judge(task, task.lesson, "grader error", reason)


def windowed(jobs: Iterable[Callable[[], Future]], size: int) -> Iterator[Any]:
    """The results of jobs as they are ready; never more than `size` are under way, so that memory stays flat."""
    waiting: set[Future] = set()
    for start in jobs:
        waiting.add(start())
        if len(waiting) >= size:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def identical(graded: Sequence[Graded]) -> list[Graded]:
    """In the order of their ids, those with the same bytes flagged with one another."""
    ordered = sorted(graded, key=lambda one: one.submission)
    same: dict[tuple[str, str], list[Graded]] = {}
    for one in ordered:
        same.setdefault((one.sha256, one.lesson), []).append(one)
    found = []
    for one in ordered:
        alike = same[one.sha256, one.lesson] if one.sha256 else []
        others = tuple(other.submission for other in alike if other.student != one.student)
        found.append(dataclasses.replace(one, identical_to=others))
    return found

"""The engine on a Dask cluster: each of its workers keeps the same worker processes as this machine would.

Dask's own processes speak pickles with one another, so the network between them must be a trusted one. What comes from
a submission travels as bytes to the worker and as JSON back.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from distributed import Client, Future, WorkerPlugin, as_completed, get_worker
from distributed.scheduler import KilledWorker

from .batch import BatchError, Read, Settings, Slot, Task, default_deadline, read_or_not, versions, without_judge
from .results import Graded, from_json, to_json

CHUNK = 25
CHUNK_BYTES = 32 << 20
NAME = "condiff-grade"
Chunk = list[tuple[Task, bytes]]


class Grader(WorkerPlugin):
    """Belongs to a Dask worker; has a slot for each of its threads."""

    name = NAME

    def __init__(self, settings: Settings, expected: tuple[tuple[str, str], ...]):
        self._settings, self._expected = settings, expected

    def setup(self, worker: Any) -> None:
        """Refuses a machine with other exercises or another grader: its verdicts would differ."""
        for (what, ours), (_, theirs) in zip(self._expected, versions(), strict=True):
            if what in ("exercises", "grader", "torch") and ours != theirs:
                raise BatchError(f"the worker {worker.address} has another version of {what}: {theirs}, here {ours}")
        self._folder = Path(tempfile.mkdtemp(prefix="condiff-grade-"))
        self._folder.chmod(0o755)
        deadline = default_deadline(self._settings.limits)
        self._slots = [Slot(self._settings, self._folder, deadline) for _ in range(worker.state.nthreads)]
        self._idle: SimpleQueue[Slot] = SimpleQueue()
        for slot in self._slots:
            self._idle.put(slot)

    def teardown(self, worker: Any) -> None:
        """End the worker processes."""
        for slot in getattr(self, "_slots", ()):
            slot.stop()
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)

    def grade(self, chunk: Chunk) -> list[str]:
        """Results as JSON."""
        slot = self._idle.get()
        try:
            return [to_json(slot.grade(task, data)) for task, data in chunk]
        finally:
            self._idle.put(slot)


def grade_chunk(chunk: Chunk) -> list[str]:
    """What a Dask task does."""
    return get_worker().plugins[NAME].grade(chunk)


class Cluster:
    """The engine at a scheduler's address, such as tcp://head:8786. A context manager."""

    def __init__(self, settings: Settings, address: str, chunk: int = CHUNK, timeout: float = 15):
        self._settings, self._address, self._chunk, self._timeout = settings, address, chunk, timeout

    def __enter__(self) -> "Cluster":
        try:
            self._client = Client(self._address, timeout=self._timeout, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise BatchError(f"no Dask scheduler answers at {self._address}: {error}") from error
        try:
            if not self._client.nthreads():
                raise BatchError(f"the scheduler at {self._address} has no workers: start them with `dask worker`")
            self._client.register_plugin(Grader(self._settings, versions()), name=NAME)
        except Exception as error:
            self._client.close()
            raise error if isinstance(error, BatchError) else BatchError(f"{self._address}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._client.unregister_worker_plugin(NAME)
        except Exception:  # the cluster is gone, and the plugin with it
            pass
        finally:
            self._client.close(timeout=5)

    def run(self, tasks: Iterable[Task], read: Read) -> Iterator[Graded]:
        """Grade the tasks; results come a chunk at a time. Never more than two chunks per thread are under way."""
        lost: list[Graded] = []
        chunks = self._chunks(tasks, read, lost)
        size = 2 * max(1, sum(self._client.nthreads().values()))
        under_way: dict[Future, Chunk] = {}
        queue = as_completed(loop=self._client.loop)

        def send(chunk: Chunk) -> None:
            future = self._client.submit(grade_chunk, chunk, pure=False)
            under_way[future] = chunk
            queue.add(future)

        for chunk in islice(chunks, size):
            send(chunk)
        for future in queue:
            chunk = under_way.pop(future)
            yield from self._results(future, chunk, send)
            yield from lost
            lost.clear()
            for chunk in islice(chunks, size - len(under_way)):
                send(chunk)
        yield from lost

    def _results(self, future: Future, chunk: Chunk, send: Callable[[Chunk], None]) -> Iterator[Graded]:
        """Of a chunk over which machines died, each submission is tried alone before it is a grader error."""
        try:
            replies = future.result()
        except KilledWorker as error:
            if len(chunk) > 1:
                for one in chunk:
                    send([one])
                return
            task = chunk[0][0]
            yield without_judge(task, task.lesson, "grader error", f"the machines it was sent to ended: {error}")
            return
        except Exception as error:
            raise BatchError(f"the cluster at {self._address}: {error}") from error
        yield from map(from_json, replies)

    def _chunks(self, tasks: Iterable[Task], read: Read, lost: list[Graded]) -> Iterator[Chunk]:
        chunk: Chunk = []
        size = 0
        for task in tasks:
            data = read_or_not(task, read)
            if isinstance(data, Graded):
                lost.append(data)
                continue
            chunk.append((task, data))
            size += len(data)
            if len(chunk) >= self._chunk or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

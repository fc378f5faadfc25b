"""What a submission's processes hold, all of them together: memory, processes, threads, disk. Linux, through /proc."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
BESIDE = 1 << 20  # bytes on the disk beside one file of the largest size that there may be
SLOW = 0.25  # seconds between two looks at what takes long to add up


def descendants(root: int) -> list[int]:
    """Every living process below `root`; what has ended and waits to be reaped is left out."""
    found, waiting = [], [root]
    while waiting:
        for child in _children(waiting.pop()):
            waiting.append(child)
            if _state(child) not in "ZX":
                found.append(child)
    return found


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    return []


def _state(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def sizes(pid: int | str) -> dict[str, int]:
    """The numbers of /proc/<pid>/status, those in kB as bytes."""
    numbers = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if words and words[0].isdigit():
                numbers[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return numbers


class Watch:
    """Tells what is over its limit. `work`: a folder on the disk itself, where no tmpfs bounds what is written."""

    def __init__(self, limits: dict[str, Any], work: str | None):
        self._limits, self._work = limits, work
        self.start()

    def start(self) -> None:
        base = sizes("self")
        self._anonymous, self._mapped = base.get("RssAnon", 0), base.get("VmSize", 0)
        self._next_exact = self._next_disk = 0.0

    def look(self) -> str | None:
        pids = descendants(os.getpid())
        of = {pid: sizes(pid) for pid in pids}
        if sum(one.get("Threads", 1) for one in of.values()) > 2 * self._limits["processes"]:
            return "processes"
        if self._too_much_memory(of):
            return "memory"
        if self._work and time.monotonic() > self._next_disk:
            self._next_disk = time.monotonic() + SLOW
            most = self._limits["disk"] + BESIDE
            if held(self._work, most) > most:
                return "disk"
        return None

    def _too_much_memory(self, of: dict[int, dict[str, int]]) -> bool:
        """A quick sum first, of what every fork has beyond the zygote; adding up shared pages rightly takes longer."""
        limit = self._limits["memory"]
        quick = possible = 0
        for one in of.values():
            forked = one.get("VmSize", 0) >= self._mapped  # else it runs another program
            anonymous = one.get("RssAnon", 0) - (self._anonymous if forked else 0)
            quick += max(0, anonymous) + one.get("RssShmem", 0)
            possible += max(0, one.get("VmSize", 0) - (self._mapped if forked else 0)) + self._anonymous
        if possible <= limit or (quick <= limit and time.monotonic() < self._next_exact):
            return False
        self._next_exact = time.monotonic() + SLOW
        # What there was before is shared with the zygote, and copied where those two that run cells and answer calls
        # write to it.
        return exact(of) > limit + 2 * self._anonymous


def exact(pids: Iterable[int]) -> int:
    """Anonymous pages, each shared one divided among those who share it, and shared mappings at their full size: their
    pages stay even where no process has them mapped in at the moment."""
    anonymous, shared = 0, {}
    for pid in pids:
        anonymous += _rollup(pid) or sizes(pid).get("RssAnon", 0)  # asked again: it may have ended since
        for key, size in _shared(pid):
            shared[key] = max(size, shared.get(key, 0))
    return anonymous + sum(shared.values())


def _rollup(pid: int) -> int:
    """Without the zygote's own pages this would be zero, so 0 says that it cannot be read."""
    numbers = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, value = line.partition(":")
            numbers[name] = int(value.split()[0]) * 1024
    return numbers.get("Pss_Anon", numbers.get("Pss", 0)) + numbers.get("SwapPss", 0)


def _shared(pid: int) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, _, device, inode, *_ = line.split(maxsplit=5)
            if mode[3] == "s" and line.endswith("(deleted)"):
                start, _, end = span.partition("-")
                yield f"{device} {inode} {span}", int(end, 16) - int(start, 16)


def held(folder: str, enough: int) -> int:
    """Bytes below a folder, each entry at least a block; a folder that cannot be read counts as `enough` and more."""
    total, waiting = 0, [folder]
    while waiting and total <= enough:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        total += max(PAGE, entry.stat(follow_symlinks=False).st_blocks * 512)
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                    if total > enough:
                        break
        except FileNotFoundError:
            continue
        except OSError:
            return enough + 1
    return total

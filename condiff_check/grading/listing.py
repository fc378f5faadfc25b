"""The files in a folder or a zip, by name: links are not followed, nothing is unpacked, and all of it is bounded."""

import io
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .intake import MAX_FILE, MB, Unreadable, open_regular, too_large

MAX_ENTRIES = 100_000
MAX_DIRECTORY = 16 * MB  # of a zip's table of contents
MAX_TOTAL = 16_000 * MB  # unpacked
RATIO = 150  # deflate reaches 1000; a notebook 10, one that repeats itself 50
DEPTH = 8


@dataclass(frozen=True)
class Problem:
    """Files that are not graded until somebody has looked at them, and why; `student` is their id, where known."""

    message: str
    files: tuple[str, ...] = ()
    student: str | None = None

    def __str__(self) -> str:
        return f"{self.message}: {', '.join(self.files)}" if self.files else self.message


@dataclass(frozen=True)
class Entry:
    """A file: its folders and its name below what was given, and where it lies. `member` is its name in a zip."""

    parts: tuple[str, ...]
    path: Path
    member: str | None = None

    @property
    def shown(self) -> str:
        return plain("/".join(self.parts))

    @property
    def notebook(self) -> bool:
        return self.parts[-1].lower().endswith(".ipynb")

    def chunks(self) -> Iterator[bytes]:
        """Its bytes. Raises Unreadable, also halfway."""
        return _file(self.path) if self.member is None else _member(self.path, self.member)


def plain(name: str) -> str:
    """A name fit for one line of a report."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return text if len(text) <= 120 else f"{text[:60]}…{text[-50:]}"


Folders = set[tuple[str, ...]]


def entries(path: Path, problems: list[Problem]) -> tuple[list[Entry], Folders]:
    """All files and folders that are not hidden; what cannot be listed is a problem."""
    try:
        path = path.resolve(strict=True)
        if path.is_dir():
            found = _Walk(problems)
            found.walk(path, ())
            return sorted(found.entries, key=lambda entry: entry.parts), found.folders
        if path.suffix.lower() == ".zip" or (path.suffix.lower() != ".ipynb" and zipfile.is_zipfile(path)):
            return _zipped(path, problems)
        return [Entry((path.name,), path)], set()
    except (OSError, ValueError, RuntimeError) as error:  # not there; a name with NUL; a loop of links
        problems.append(
            Problem(f"it cannot be opened ({getattr(error, 'strerror', None) or error})", (plain(str(path)),))
        )
        return [], set()


def _hidden(name: str) -> bool:
    """What systems leave behind: .ipynb_checkpoints, ._x.ipynb, __MACOSX."""
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


class _Walk:
    """Folders, entered one by one."""

    def __init__(self, problems: list[Problem]):
        self.entries: list[Entry] = []
        self.folders: Folders = set()
        self.problems, self._count = problems, 0

    def walk(self, folder: Path, parts: tuple[str, ...]) -> None:
        try:
            with os.scandir(folder) as found:
                for item in found:
                    self._count += 1
                    if self._count > MAX_ENTRIES:
                        if self._count == MAX_ENTRIES + 1:
                            text = f"more than {MAX_ENTRIES} files: the rest was left out; give the folder of notebooks"
                            self.problems.append(Problem(text))
                        return
                    if not _hidden(item.name):
                        self._take(item, (*parts, item.name))
        except OSError as error:
            self.problems.append(Problem(f"the folder cannot be read ({error.strerror})", (plain("/".join(parts)),)))

    def _take(self, item: os.DirEntry, parts: tuple[str, ...]) -> None:
        name = plain("/".join(parts))
        if item.is_dir(follow_symlinks=False):
            self.folders.add(parts)
            if len(parts) > DEPTH:
                self.problems.append(Problem("too many folders in one another", (name,)))
            else:
                self.walk(Path(item.path), parts)
        elif item.is_file(follow_symlinks=False):
            self.entries.append(Entry(parts, Path(item.path)))
        elif item.is_symlink():
            self.problems.append(Problem("a link is not followed: put the file itself there", (name,)))
        else:
            self.problems.append(Problem("it is no ordinary file", (name,)))


class _Bounded(io.BufferedReader):
    """A zip whose table of contents is not taken into memory when it is too long."""

    def read(self, size: int | None = -1) -> bytes:
        most = MAX_DIRECTORY + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) == most:
            raise zipfile.BadZipFile("its table of contents is too long")
        if data.count(zipfile.stringCentralDir) > MAX_ENTRIES:
            raise zipfile.BadZipFile(f"it has more than {MAX_ENTRIES} entries")
        return data


@lru_cache(maxsize=2)
def _opened(path: Path, stamp: tuple[int, ...]) -> zipfile.ZipFile:
    return zipfile.ZipFile(_Bounded(open_regular(path, most=None).detach()))


def _open(path: Path) -> zipfile.ZipFile:
    """A zip, kept open from one member to the next; not across a fork, where two processes would share its position."""
    about = path.stat()
    return _opened(path, (os.getpid(), about.st_size, about.st_mtime_ns))


BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError, LookupError)


def _zipped(path: Path, problems: list[Problem]) -> tuple[list[Entry], Folders]:
    try:
        infos = _open(path).infolist()
        if sum(info.file_size for info in infos) > MAX_TOTAL:
            raise zipfile.BadZipFile(f"unpacked it would have more than {MAX_TOTAL // MB} MB")
    except (*BROKEN, Unreadable) as error:
        problems.append(Problem(f"the zip cannot be used ({plain(str(error))})", (plain(path.name),)))
        return [], set()
    found, folders = [], set()
    times = Counter(_parts(info) for info in infos)
    for info in infos:
        parts = _parts(info)
        if not parts or any(_hidden(part) for part in parts if part != ".."):
            continue
        folders.update(parts[:depth] for depth in range(1, min(len(parts), DEPTH)))
        if info.is_dir():
            folders.add(parts)
            continue
        entry = Entry(parts, path, info.filename)
        why = "it is in the zip twice" if times[parts] > 1 else _suspect(info)
        if why and entry.notebook:
            problems.append(Problem(why, (entry.shown,)))
        else:
            found.append(entry)
    return sorted(found, key=lambda entry: entry.parts), folders


def _parts(info: zipfile.ZipInfo) -> tuple[str, ...]:
    return tuple(part for part in info.filename.replace("\\", "/").split("/") if part not in ("", "."))


def _suspect(info: zipfile.ZipInfo) -> str | None:
    """Why a member of a zip is not read."""
    name = info.filename.replace("\\", "/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if ".." in name.split("/") or name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "its name leads out of the zip"
    if info.create_system == 3 and kind not in (0, stat.S_IFREG):
        return "it is a link or no ordinary file"
    if info.flag_bits & 1:
        return "it is encrypted: unpack the zip with its password and give the folder"
    if name.count("/") > DEPTH:
        return "too many folders in one another"
    if info.file_size > 10 * MB and info.file_size > RATIO * max(info.compress_size, 1):
        return f"it grows more than {RATIO} times when unpacked, as a zip bomb does"
    return None


def _file(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        try:
            yield from iter(lambda: file.read(MB), b"")
        except OSError as error:
            raise Unreadable(f"the file cannot be read ({error.strerror})", "grade it again", ours=True) from None


def _member(path: Path, name: str) -> Iterator[bytes]:
    try:
        archive = _open(path)
        info = archive.getinfo(name)
        if info.file_size > MAX_FILE:
            raise too_large(info.file_size)
        if _suspect(info):
            raise Unreadable(_suspect(info), "hand in the notebook itself")
        with archive.open(info) as file:  # reads no more than file_size
            yield from iter(lambda: file.read(MB), b"")
    except FileNotFoundError:
        raise Unreadable("the zip is gone", "grade it again", ours=True) from None
    except BROKEN as error:
        text = plain(str(error))
        raise Unreadable(f"it cannot be unpacked ({text})", "look at the zip, or give the folder", ours=True) from None

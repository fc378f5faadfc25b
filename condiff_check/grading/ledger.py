"""The memory of a batch: what is graded stays graded, whatever ends the run."""

import dataclasses
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .results import Graded, Verdict, from_json, to_json

FILE, LOCK = "ledger.sqlite", "ledger.lock"
FORMAT = 1
KEY = "submission, sha256, exercises, grader, secret"
TABLES = f"""
CREATE TABLE IF NOT EXISTS graded ({KEY}, result TEXT NOT NULL, PRIMARY KEY ({KEY}));
CREATE TABLE IF NOT EXISTS marks ({KEY}, exercise, PRIMARY KEY ({KEY}, exercise));
CREATE TABLE IF NOT EXISTS log (number INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT, {KEY}, verdicts TEXT);
"""
SAME_KEY = " AND ".join(f"{name} = ?" for name in KEY.split(", "))


class LedgerError(RuntimeError):
    """The results folder or the ledger in it cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Key:
    """What a result depends on. With another key a submission is graded anew."""

    submission: str
    sha256: str
    exercises: str
    grader: str
    secret: str


class Ledger:
    """A sqlite file in the results folder, for one run at a time: a context manager that holds the lock.

    What `put` returned from is on the disk. The lock is the operating system's: it ends with the process that has it,
    whatever ends that.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / FILE
        self._lock = FileLock(folder / LOCK)
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> "Ledger":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(f"another condiff-grade is at work on {self.folder}: wait for it, or stop it") from None
        except OSError as error:
            raise LedgerError(f"cannot write to the results folder {self.folder}: {error.strerror or error}") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give the lock back."""
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None
        self._lock.release()

    def get(self, key: Key) -> Graded | None:
        """What is known under this key; exercises may be missing from it."""
        with self._clear_errors():
            row = self._sql(f"SELECT result FROM graded WHERE {SAME_KEY}", dataclasses.astuple(key)).fetchone()
            return from_json(row[0]) if row else None

    def todo(self, key: Key, wanted: Collection[str]) -> tuple[str, ...]:
        """Which of these exercises are still to be graded: the missing ones, those that `regrade` has marked, and
        those on which the grader failed."""
        known = self.get(key)
        if known is None:
            return tuple(wanted)
        done = {one.exercise for one in known.verdicts if one.outcome != "grader error"} - self._marked(key)
        return tuple(exercise for exercise in wanted if exercise not in done)

    def done(self, key: Key, wanted: Collection[str] = ()) -> bool:
        """Whether nothing is left to do under this key. What could not be read does not get better by trying again."""
        known = self.get(key)
        if known is None:
            return False
        if not known.verdicts:
            return known.status == "unreadable"
        return not self.todo(key, wanted)

    def put(self, key: Key, graded: Graded) -> Graded:
        """Keep a result. Verdicts that are there and not among the new ones stay; returns the whole."""
        with self._clear_errors(), self._transaction():
            known = self.get(key)
            whole = merge(known, graded) if known else graded
            row = dataclasses.astuple(key)
            exercises = [verdict.exercise for verdict in graded.verdicts]
            self._sql(f"INSERT OR REPLACE INTO graded ({KEY}, result) VALUES (?,?,?,?,?,?)", (*row, to_json(whole)))
            for exercise in exercises:
                self._sql(f"DELETE FROM marks WHERE {SAME_KEY} AND exercise = ?", (*row, exercise))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            log = (now, *row, json.dumps(exercises))
            self._sql(f"INSERT INTO log (at, {KEY}, verdicts) VALUES (?,?,?,?,?,?,?)", log)
        return whole

    def regrade(self, exercise: str, keys: Iterable[Key] | None = None) -> int:
        """Mark an exercise in what has been graded under these keys, by default all; the next batch grades it again.

        Where an earlier regrade of it was cut off, only what that one left is still marked. Returns how many are.
        """
        lesson = exercise.partition(".")[0]
        with self._clear_errors(), self._transaction():
            known = [Key(*row) for row in self._sql(f"SELECT {KEY} FROM graded").fetchall()] if keys is None else keys
            theirs = [key for key in known if (found := self.get(key)) and found.lesson == lesson]
            if not (left := sum(exercise in self._marked(key) for key in theirs)):
                rows = [(*dataclasses.astuple(key), exercise) for key in theirs]
                self._database.executemany(f"INSERT INTO marks ({KEY}, exercise) VALUES (?,?,?,?,?,?)", rows)
                left = len(rows)
        return left

    def all(self) -> Iterator[Graded]:
        """The latest result of every submission, in the order of their ids."""
        with self._clear_errors():
            latest = "SELECT submission, MAX(rowid) AS last FROM graded GROUP BY submission"
            rows = self._sql(
                f"SELECT result FROM graded JOIN ({latest}) ON graded.rowid = last ORDER BY graded.submission"
            )
            for (text,) in rows:
                yield from_json(text)

    def log(self) -> list[tuple[str, tuple[str, ...]]]:
        """(submission, exercises) of every result that was put in, in that order."""
        with self._clear_errors():
            rows = self._sql("SELECT submission, verdicts FROM log ORDER BY number").fetchall()
        return [(submission, tuple(json.loads(verdicts))) for submission, verdicts in rows]

    def last(self) -> int:
        """The number of the latest entry in the log."""
        with self._clear_errors():
            return self._sql("SELECT COALESCE(MAX(number), 0) FROM log").fetchone()[0]

    def secret(self) -> str | None:
        """The name of the secret with which the latest result was made."""
        with self._clear_errors():
            row = self._sql("SELECT secret FROM log ORDER BY number DESC LIMIT 1").fetchone()
        return row[0] if row else None

    def before(self, key: Key) -> Key | None:
        """Under which other key these bytes of this submission were graded last, where they are not under this one."""
        with self._clear_errors():
            if self.get(key) is not None:
                return None
            sql = f"SELECT {KEY} FROM graded WHERE submission = ? AND sha256 = ? ORDER BY rowid DESC LIMIT 1"
            row = self._sql(sql, (key.submission, key.sha256)).fetchone()
        return Key(*row) if row else None

    def forget(self, after: int) -> None:
        """Drop all results that were put in after this number of the log, since they cannot be trusted."""
        with self._clear_errors(), self._transaction():
            rows = self._sql(f"SELECT {KEY} FROM log WHERE number > ?", (after,)).fetchall()
            for row in rows:
                self._sql(f"DELETE FROM graded WHERE {SAME_KEY}", row)
            self._sql("DELETE FROM log WHERE number > ?", (after,))

    # --- the file ---

    def _open(self) -> None:
        with self._clear_errors():
            self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._sql("PRAGMA journal_mode = WAL")  # stays as it was on file systems that cannot do it
            self._sql("PRAGMA synchronous = FULL")
            (found,) = self._sql("PRAGMA quick_check").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            (version,) = self._sql("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise LedgerError(f"{self.path} was written by a newer condiff-grade: use that one, or another folder")
            self._database.executescript(TABLES)
            self._sql(f"PRAGMA user_version = {FORMAT}")
            self._sql("BEGIN IMMEDIATE")  # finds a folder that cannot be written before an hour's work does
            self._sql("COMMIT")

    def _sql(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        if self._database is None:
            raise LedgerError(f"the ledger {self.path} is not open")
        return self._database.execute(statement, values)

    def _marked(self, key: Key) -> set[str]:
        with self._clear_errors():
            rows = self._sql(f"SELECT exercise FROM marks WHERE {SAME_KEY}", dataclasses.astuple(key))
            return {exercise for (exercise,) in rows}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._sql("BEGIN IMMEDIATE")
        try:
            yield
            self._sql("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._sql("ROLLBACK")
            raise

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise LedgerError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        text = str(error)
        if "full" in text:
            return f"no space left for {self.path}: make room and run the same command again, it goes on from here"
        if "locked" in text:
            return f"{self.path} is in use by another program: close that and run the same command again"
        if "readonly" in text or "unable to open" in text or "disk I/O" in text:
            return f"{self.path} cannot be written: {text}; look at the folder's permissions and its disk"
        aside = f"move it aside (mv {self.path} {self.path}.damaged) and run the same command again to grade anew"
        return f"{self.path} is damaged: {text}; {aside}"


def merge(known: Graded, new: Graded) -> Graded:
    """The known result with the verdicts of the new one put in their places."""
    if not known.verdicts or not new.verdicts:
        return new
    verdicts = {verdict.exercise: verdict for verdict in (*known.verdicts, *new.verdicts)}
    ordered = tuple(sorted(verdicts.values(), key=_place))
    failed = any(verdict.outcome == "grader error" for verdict in ordered)
    return dataclasses.replace(new, verdicts=ordered, status="grader error" if failed else new.status)


def _place(verdict: Verdict) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in verdict.exercise.split("."))

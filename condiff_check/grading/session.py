"""The judge's end of the calls: an answer in another process, which facts call as if it were here."""

import os
import socket
import time
from collections.abc import Callable, Sequence

import torch

from ..agent.errors import describe
from ..agent.peer import Peer
from ..agent.runner import ROOT
from ..agent.watching import Columns
from ..agent.wire import Ended, Late, TooMany, Violation, Wire, WireError
from ..guard import Failed, NotDone, OutOfTime

CALLS = 20_000  # of models and functions that an exercise hands over
BODY = 16 << 20  # bytes of the largest message that a child may send


class Session:
    """One exercise of one submission. `ended` says why no more calls are answered, None as long as they are."""

    def __init__(self, connection: socket.socket, seconds: float, calls: int = CALLS):
        self._deadline: float | None = time.monotonic() + seconds
        self.peer = Peer(Wire(connection, lambda: self._deadline, BODY), "J", trusted=True, allowed=calls)

    def objects(self, names: Sequence[str], back: int = 0) -> list[object]:
        """The submission's definitions; with `back` those before the last. Raises wire.WireError."""
        try:
            return [self.peer.call(ROOT, "", [name, back]) for name in names]
        except WireError:
            raise
        except Exception as error:  # no code of the submission's is due to run
            raise Violation(f"no definition: {_told(error)}") from error

    def guard(self, seconds: float) -> "RemoteGuard":
        return RemoteGuard(self, seconds)

    def within(self, seconds: float) -> None:
        """The other side has so long from now."""
        self._deadline = time.monotonic() + seconds

    def close(self) -> None:
        """Hang up, and put back what the other side has changed."""
        self.peer.wire.close()
        self.peer.undo()

    @property
    def ended(self) -> WireError | None:
        return self.peer.ended


def patience() -> float:
    """How many times longer things take where more processes want to run than there are cores: 1 to 8.

    Limits are of wall time, since what sleeps must end, too; a right answer must not fail for what else runs.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 1.0
    return min(max(load / (os.cpu_count() or 1), 1.0), 8.0)


class RemoteGuard:
    """As guard.Guard, for code in another process: errors kept apart, and a limit of time for all calls together."""

    def __init__(self, session: Session, seconds: float):
        self._session, self.seconds, self._left, self.noise = session, seconds, seconds * patience(), 0
        self.printed = None

    def __call__(self, function: Callable, *args: object) -> object:
        start = time.monotonic()
        peer = self._session.peer
        self._session.within(self._left)
        peer.seed = self.noise
        before = torch.default_generator.get_state()  # the judge's own models draw, when they are called back
        try:
            peer.share_random(self.noise)
            return function(*args)
        except NotImplementedError as error:
            if str(error):  # torch raises these too, with a message
                raise Failed(_told(error)) from error
            raise NotDone from None
        except WireError as error:
            raise _explained(error, self.seconds) from None
        except (Failed, NotDone, OutOfTime):
            raise
        except Exception as error:
            if getattr(error, "kind", "") == "SystemExit":
                raise Failed("your code called exit(): return a value instead") from None
            raise Failed(_told(error)) from error
        finally:
            torch.default_generator.set_state(before)
            peer.seed = None
            peer.share_random(None)
            self._left -= time.monotonic() - start

    def watched(self, columns: Columns, function: Callable, *args: object) -> object:
        """A call that the other side looks on at. It may lie, as about anything that is no result."""
        peer = self._session.peer
        peer.watch = columns.settings
        try:
            found = self(function, *args)
        finally:
            peer.watch = None
        match peer.watched:
            case [int() | float() as widest, int() | float() as held]:
                columns.widest, columns.held = float(widest), float(held)
            case _:
                raise Failed("nobody looked on")
        return found


def _told(error: Exception) -> str:
    return getattr(error, "told", None) or describe(error)


def _explained(error: WireError, seconds: float) -> Exception:
    match error:
        case Late():
            return OutOfTime(f"needs more than {seconds:.0f} seconds: is there an endless loop?")
        case Ended():
            return Failed("the process ended while your code ran")
        case TooMany():
            return Failed(f"{error}: is there an endless loop?")
        case Violation():
            return Failed(f"what came back is no answer: {error}")
    return Failed(str(error))

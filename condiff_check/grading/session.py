"""The judge's end of the calls: an answer in another process, which facts call as if it were here."""

import socket
import time
from collections.abc import Callable, Sequence

from ..agent.errors import describe
from ..agent.peer import Peer
from ..agent.runner import ROOT
from ..agent.wire import Ended, Late, TooMany, Violation, Wire, WireError
from ..guard import Failed, NotDone, OutOfTime

CALLS = 20_000  # of models and functions that an exercise hands over


class Session:
    """One exercise of one submission. `ended` says why no more calls are answered, None as long as they are."""

    def __init__(self, connection: socket.socket, seconds: float, calls: int = CALLS):
        self._deadline: float | None = time.monotonic() + seconds
        self.peer = Peer(Wire(connection, lambda: self._deadline), "J", trusted=True, allowed=calls)

    def objects(self, names: Sequence[str], back: int = 0) -> list[object]:
        """The submission's definitions; with `back` those before the last. Raises wire.WireError."""
        return [self.peer.call(ROOT, "", [name, back]) for name in names]

    def guard(self, seconds: float) -> "RemoteGuard":
        return RemoteGuard(self, seconds)

    def within(self, seconds: float) -> None:
        """The other side has so long from now."""
        self._deadline = time.monotonic() + seconds

    @property
    def ended(self) -> WireError | None:
        return self.peer.ended


class RemoteGuard:
    """As guard.Guard, for code in another process: errors kept apart, and a limit of time for all calls together."""

    def __init__(self, session: Session, seconds: float):
        self._session, self.seconds, self._left, self.noise = session, seconds, seconds, 0
        self.printed = None

    def __call__(self, function: Callable, *args: object) -> object:
        start = time.monotonic()
        peer = self._session.peer
        self._session.within(self._left)
        peer.seed = self.noise
        try:
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
            peer.seed = None
            self._left -= time.monotonic() - start


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

"""Run a learner's code so that nothing it does harms the notebook: bounded in time and in print, errors kept apart."""

import contextlib
import io
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from .agent.errors import describe
from .agent.watching import Columns


class Failed(Exception):
    """The learner's code raised. The message names the error and the learner's own line."""


class NotDone(Exception):
    """The answer is still to be written: its body is `raise NotImplementedError`."""


class OutOfTime(Exception):
    """The answer needs longer than it may."""


class Guard:
    """Calls a learner's functions; `seconds` bounds all calls together. What they print is kept in `printed`.

    Each call starts from the global random state that `noise` seeds, so that code which draws from it can be compared.
    """

    def __init__(self, seconds: float):
        self.seconds, self._left, self.noise = seconds, seconds, 0
        self.printed = _Kept(limit=2000)

    def __call__(self, function: Callable, *args: object) -> object:
        start = time.monotonic()
        try:
            with _contained(self.printed, self.noise), _time_limit(self._left):
                return function(*args)
        except _Alarm:
            raise OutOfTime(f"needs more than {self.seconds:.0f} seconds: is there an endless loop?") from None
        except NotImplementedError as error:
            if str(error):  # torch raises these too, with a message
                raise Failed(describe(error)) from error
            raise NotDone from None
        except (Failed, NotDone, OutOfTime):
            raise
        except Exception as error:
            raise Failed(describe(error)) from error
        except SystemExit:
            raise Failed("your code called exit(): return a value instead") from None
        finally:
            self._left -= time.monotonic() - start

    def watched(self, columns: Columns, function: Callable, *args: object) -> object:
        """A call that `columns` looks on at."""
        with columns:
            return self(function, *args)


class _Alarm(BaseException):
    """Not an Exception, so that a learner's `except Exception` does not swallow it."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _Alarm after so many seconds; where there are no signals (Windows, other threads) there is no limit."""
    if seconds <= 0:
        raise _Alarm
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _Alarm

    handler = signal.signal(signal.SIGALRM, ring)
    start = time.monotonic()
    # it rings again each second, should the first one be swallowed by a bare `except:`
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - start), 1e-3), interval)


@contextlib.contextmanager
def _contained(printed: "_Kept", noise: int) -> Iterator[None]:
    """Undo what a call does to torch's global state, keep its prints, and hold back its warnings."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(noise)  # torch.manual_seed takes 2 ms where torch knows CUDA
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(noise)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


class _Kept(io.TextIOBase):
    """A stream that keeps its first characters and counts the rest."""

    def __init__(self, limit: int):
        self._limit, self.text, self.total = limit, "", 0

    def write(self, text: str) -> int:
        self.text += text[: max(0, self._limit - len(self.text))]
        self.total += len(text)
        return len(text)

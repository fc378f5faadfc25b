"""An error in the words that a learner reads, and as it crosses the wire."""

import builtins
import linecache
import sys
import traceback
from pathlib import Path

COURSE = frozenset(("condiff_check", "condiff_ref", "condiff_agent"))
HERE = Path(__file__).parent
OURS = ("guard.py", "exercise.py")
LONGEST = 2000  # characters of a message


def describe(error: BaseException) -> str:
    """The error in one line, and the line of the learner's own code that led to it."""
    message = one_line(error)
    if isinstance(error, RuntimeError) and "Double" in message and "Float" in message:
        message += " (some inputs are float64; what you make yourself takes their dtype: dtype=...)"
    frame = _own_frame(error)
    if frame is None:
        return message
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{message}\n  at line {frame.lineno} of {frame.name}:  {line}"


def one_line(error: BaseException) -> str:
    """Its type and message, even if the message cannot be had."""
    try:
        return traceback.format_exception_only(error)[-1].strip()[:LONGEST]
    except Exception:
        return type(error).__name__


def _own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame that belongs neither to the course's packages nor to an installed one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(sys.base_prefix)]
    own = [f for f in own if Path(f.filename).name not in OURS and Path(f.filename).parent != HERE]
    learners = [f for f in own if not COURSE & set(Path(f.filename).parts)]
    return (learners or own or [None])[-1]


def pack(error: BaseException) -> dict:
    """As JSON: the type's name and module, the message, and the description."""
    kind = type(error)
    try:
        message = str(error)[:LONGEST]
    except Exception:
        message = ""
    return dict(type=kind.__name__[:80], module=str(kind.__module__)[:80], text=message, told=describe(error)[:LONGEST])


class Remote(Exception):
    """An error of a type that only the other side knows."""


def unpack(packed: dict) -> BaseException:
    """An error that looks like the one packed. `told` is how the other side describes it.

    Raises ValueError for what pack did not make.
    """
    name, module, text, told = (packed.get(key) for key in ("type", "module", "text", "told"))
    if not all(isinstance(item, str) and len(item) <= LONGEST for item in (name, module, text, told)):
        raise ValueError("an error without its parts")
    kind = getattr(builtins, name, None) if module == "builtins" else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
        kind = type(name if name.isidentifier() else "Error", (Remote,), {"__module__": module})
    error = kind(text)
    error.told = told
    error.kind = name
    return error

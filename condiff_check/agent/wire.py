"""Frames: a header of bounded JSON and a body of bounded raw bytes, over a socket. Nothing is ever unpickled.

u32 length of the header | u32 length of the body | header, UTF-8 JSON | body
"""

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

LENGTHS = struct.Struct("<II")
HEADER = 1 << 20  # bytes at most
BODY = 64 << 20
DEPTH = 40  # of lists within lists
# what is raised by code that reads a message which is not as it should be
ODD = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)


class WireError(Exception):
    """The connection is of no more use."""


class Violation(WireError):
    """What came is no frame, or none that was due."""


class TooMany(Violation):
    """More calls than are answered."""


class Ended(WireError):
    """The other side is gone."""


class Late(WireError):
    """The deadline has passed."""


class Wire:
    """A connection. `deadline()` is the time.monotonic() by which a frame must have come or gone; None is for ever.
    `body`: bytes of the largest body that is taken.
    """

    def __init__(
        self, connection: socket.socket, deadline: Callable[[], float | None] = lambda: None, body: int = BODY
    ):
        self._socket, self._deadline, self._body = connection, deadline, body
        connection.setblocking(False)
        self._polls = {}
        for event in (select.POLLIN, select.POLLOUT):
            self._polls[event] = select.poll()
            self._polls[event].register(connection, event)

    def send(self, header: dict, chunks: Sequence[bytes | memoryview] = ()) -> None:
        """Raises Violation for what is too large, Ended and Late."""
        text = _ENCODER.encode(header).encode()
        size = sum(len(chunk) for chunk in chunks)
        self._left()
        if len(text) > HEADER or size > BODY:
            raise Violation(f"a message of {(len(text) + size) / 1e6:.0f} MB is too large: {BODY >> 20} MiB at most")
        self._send(memoryview(b"".join((LENGTHS.pack(len(text), size), text, *chunks))))

    def receive(self) -> tuple[dict, bytearray]:
        """The next frame. Raises Violation for what is none, Ended and Late: also when frames come without a pause."""
        self._left()
        header, body = LENGTHS.unpack(self._receive(LENGTHS.size))
        if header > HEADER or body > self._body:
            raise Violation(f"a frame announces {header} and {body} bytes")
        return _parsed(self._receive(header)), self._receive(body)

    def close(self) -> None:
        self._socket.close()

    def _send(self, data: memoryview) -> None:
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise Ended from error

    def _receive(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(min(size - len(data), 1 << 20))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise Ended from error
            if not part:
                raise Ended
            data += part
        return data

    def _left(self) -> float | None:
        """The seconds that are left. Raises Late if none are."""
        deadline = self._deadline()
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise Late
        return left

    def _wait(self, event: int) -> None:
        left = self._left()
        self._polls[event].poll(None if left is None else 1000 * left + 1)


def _parsed(text: bytes) -> dict:
    try:
        header = _DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise Violation(f"a header is no JSON: {type(error).__name__}") from None
    if not isinstance(header, dict) or _depth(header) > DEPTH:
        raise Violation("a header is nested too deep, or no object")
    return header


def _refuse(name: str) -> None:
    raise ValueError(name)


def _integer(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError("an integer of more than 400 digits")
    return int(digits)


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object, parse_int=_integer)


def _depth(value: object) -> int:
    """Of lists and objects in one another, without recursion."""
    depth, level = 0, [value]
    while level and depth <= DEPTH:
        depth += 1
        below: list[object] = []
        for item in level:
            if type(item) is list:
                below += item
            elif type(item) is dict:
                below += item.values()
        level = below
    return depth

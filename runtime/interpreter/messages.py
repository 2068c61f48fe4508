"""Messages between a process and its interpreter: JSON with a length before it, and open files where one is sent."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Any, files: Sequence[int] = ()) -> None:
    """Send one message, with descriptors of open files, which stay the sender's.

    Raises:
        OSError: the other side is gone.
    """
    data = json.dumps(message, separators=(",", ":")).encode()
    header = _LENGTH.pack(len(data))
    if files:
        socket.send_fds(connection, [header], list(files))
    else:
        connection.sendall(header)
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message and the descriptors that came with it, which are the receiver's to close.

    Raises:
        EOFError: the other side has closed.
        OSError: it is gone.
    """
    header, files, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    header += _exactly(connection, _LENGTH.size - len(header)) if header else b""
    if not header:
        raise EOFError
    return json.loads(_exactly(connection, _LENGTH.unpack(header)[0])), files


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)

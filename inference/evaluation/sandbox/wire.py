"""Messages between `sandbox.py` and its runner: two lengths, a JSON header, and bytes as they are.

Standard library only: both sides load it, the runner in a clean `python -I`.
"""

from __future__ import annotations

import json
import socket
import struct

HEADER = struct.Struct("!II")  # bytes of the JSON header, bytes of the body after it


def receive(connection: socket.socket) -> tuple[dict, bytes] | None:
    """One message; None where the other side is gone."""
    sizes = _exactly(connection, HEADER.size)
    if len(sizes) < HEADER.size:
        return None
    first, second = HEADER.unpack(sizes)
    header, body = _exactly(connection, first), _exactly(connection, second)
    complete = len(header) == first and len(body) == second
    return (json.loads(header), bytes(body)) if complete else None


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size and (part := connection.recv(min(size - len(data), 1 << 20))):
        data += part
    return data


def send(connection: socket.socket, header: dict, body: bytes = b"") -> None:
    text = json.dumps(header).encode()
    connection.sendall(HEADER.pack(len(text), len(body)) + text + body)

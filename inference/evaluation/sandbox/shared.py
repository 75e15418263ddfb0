"""What both sides of the sandbox need: messages (a line of JSON, then bytes) and `remove_tree`.

Standard library only: it is also loaded in the clean interpreter of a zygote (see `runner.py`).
"""

from __future__ import annotations

import json
import os
import socket
from typing import BinaryIO


def send(connection: socket.socket, header: dict, body: bytes = b"") -> None:
    line = json.dumps({**header, "size": len(body)}).encode()
    connection.sendall(line + b"\n" + body)


def receive(stream: BinaryIO) -> tuple[dict, bytes]:
    """One message from a connection's `makefile("rb")`. EOFError where the other side is gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    size = header.pop("size")
    body = stream.read(size)
    if len(body) < size:
        raise EOFError
    return header, body


def remove_tree(top: str) -> None:
    """Remove a folder of any depth and any modes: inner folders are moved to the top first."""
    folders = [top]
    for folder in folders:  # grows on the way
        with os.scandir(folder) as entries:
            rows = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for path, is_folder in rows:
            if not is_folder:
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            target = path if folder == top else f"{top}/{len(folders)}"
            os.rename(path, target)
            folders.append(target)
    for folder in reversed(folders):
        os.rmdir(folder)

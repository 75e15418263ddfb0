"""Tries to leave memory behind that no process owns."""

import ctypes
import os

libc = ctypes.CDLL(None)
segment = libc.shmget(0x48535431, 1 << 20, 0o1600)
libc.semget(0x48535431, 1, 0o1600)
libc.msgget(0x48535431, 0o1600)
for name in (b"/hostile-left", b"/hostile-left-2"):
    try:
        descriptor = libc.shm_open(name, os.O_CREAT | os.O_RDWR, 0o600)
        os.ftruncate(descriptor, 1 << 16)
    except (AttributeError, OSError):
        pass
print("left" if segment >= 0 else "nothing left")

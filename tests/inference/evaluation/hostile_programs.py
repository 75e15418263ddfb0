"""Hostile programs, a function each: `hostile_runs.py` runs this file and a call of one of them."""

import atexit
import builtins
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress


def sleep():
    time.sleep(10**6)


def infinite_output():
    while True:
        print("x" * 1000)


def catches_signals():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        with suppress(OSError):
            signal.signal(number, lambda *_: None)
    while True:
        pass


def closes_descriptors():
    """Its runner's channel too."""
    os.closerange(0, 1 << 16)
    print("nobody hears this")


def memory_bomb():
    kept = []
    for _ in range(1 << 14):
        kept.append(bytearray(b"x") * (1 << 20))


def memory_bomb_family():
    """Each process stays below the limit of one; together they do not."""
    for _ in range(6):
        if os.fork() == 0:
            break
    kept = bytearray(b"x") * (60 << 20)
    time.sleep(100 + len(kept) % 2)


def fork_bomb():
    """It ends after a minute, for the day when the walls have a hole."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(OSError):
            os.fork()


def double_fork():
    """Leaves a daemon behind: forked twice, in a session of its own, deaf, writing files."""
    if os.fork() == 0:
        os.setsid()
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        if os.fork():
            os._exit(0)
        for i in range(6000):
            for folder in (".", "/tmp", "/var/tmp", "/dev/shm"):
                with suppress(OSError):
                    open(f"{folder}/hostile-left-{i % 7}", "w").close()
            time.sleep(0.01)
    time.sleep(0.1)
    print("parent done")


def kills_its_parent():
    """Or lets it starve."""
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        with suppress(OSError):
            os.kill(os.getppid(), number)
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE):
        with suppress(OSError, ValueError):
            resource.prlimit(os.getppid(), limit, (0, 0))
            print("starved it")
    print("still here")


def socket_out():
    """Calls the host on a port that it is told about."""
    connection = socket.create_connection(("127.0.0.1", int(input())), timeout=5)
    connection.sendall(b"the tests are")
    print("told")


def leaves_shared_memory():
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0x48535431, 1 << 20, 0o1600)
    libc.semget(0x48535431, 1, 0o1600)
    libc.msgget(0x48535431, 0o1600)
    for name in (b"/hostile-left", b"/hostile-left-2"):
        with suppress(AttributeError, OSError):
            os.ftruncate(libc.shm_open(name, os.O_CREAT | os.O_RDWR, 0o600), 1 << 16)
    print("left" if segment >= 0 else "nothing left")


def writes_gigabytes():
    with open("hostile-left", "wb") as file:
        for _ in range(1 << 13):
            file.write(bytes(1 << 20))


def writes_many_files():
    """Below the size limit, in folders one inside the other."""
    for number in range(1 << 30):
        folder = f"hostile-left-{number}"
        os.mkdir(folder)
        with open(f"{folder}/data", "wb") as file:
            file.write(bytes(1 << 16))
        os.chdir(folder)


def deletes_above():
    """Deletes and overwrites what is above its folder, and a folder that it is told about."""
    victim = input()
    for folder in ("..", victim):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (
        f"{victim}/precious",
        f"{victim}/hostile-left",
        "/hostile-left",
        "/usr/hostile-left",
    ):
        for attempt in (os.remove, lambda p: open(p, "w").close(), lambda p: os.chmod(p, 0)):
            with suppress(OSError):
                attempt(path)
    print("tried")


def forges_result():
    """Digs the token and the channel out of its runner's frames and says what it likes."""
    global answer

    def forge(kind, text):
        frame = sys._getframe()
        while frame is not None:
            names = frame.f_locals
            if "channel" in names and "token" in names:
                os.write(names["channel"], names["token"] + kind + text)
                return
            frame = frame.f_back
        raise LookupError("the runner keeps its secrets elsewhere: bring this program up to date")

    def answer(*_):
        forge(b"V", b'"accepted"')
        os._exit(0)

    if __name__ == "__main__":
        forge(b"F", b"blame the harness")
        forge(b"C", b"blame the compiler")
        os._exit(0)


def patches_runner():
    """Takes over everything that its runner might use to say how it went."""
    global answer

    class Agreeable(str):
        __eq__ = lambda *_: True  # noqa: E731
        __ne__ = lambda *_: False  # noqa: E731
        __hash__ = str.__hash__

    def success(*_, **__):
        return Agreeable('{"status": "accepted"}')

    def answer(*_):
        return Agreeable("right")

    json.dumps = json.loads = json.JSONEncoder.encode = success
    for name in ("compile", "exec", "print", "open"):
        setattr(builtins, name, success)
    sys.excepthook = success
    atexit.register(success)
    os._exit = lambda status: os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout.write('{"status": "accepted", "verdict": true}\n')
    sys.stdout.flush()
    sys.modules.clear()

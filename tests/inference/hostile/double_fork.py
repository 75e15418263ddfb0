"""Leaves a daemon behind: forked twice, in a session of its own, deaf to signals, writing files for
a minute.
"""

import os
import signal
import time

if os.fork() == 0:
    os.setsid()
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    for i in range(6000):
        for folder in (".", "/tmp", "/var/tmp", "/dev/shm"):
            try:
                open(f"{folder}/hostile-left-{i % 7}", "w").close()
            except OSError:
                pass
        time.sleep(0.01)
time.sleep(0.1)
print("parent done")

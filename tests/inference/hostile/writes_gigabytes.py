"""Fills the disk with one file."""

with open("hostile-left", "wb") as file:
    for _ in range(1 << 13):
        file.write(bytes(1 << 20))

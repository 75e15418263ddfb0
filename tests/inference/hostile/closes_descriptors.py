"""Closes everything that is open, its runner's channel too."""

import os

os.closerange(0, 1 << 16)
print("nobody hears this")

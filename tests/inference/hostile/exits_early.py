"""Reports success before it has printed anything."""

import sys

sys.exit(0)
print(42)

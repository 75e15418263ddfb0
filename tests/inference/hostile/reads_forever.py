"""Reads standard input again and again."""

import sys

while True:
    sys.stdin.read()

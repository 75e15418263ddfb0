"""Takes memory and touches it."""

kept = []
for _ in range(1 << 14):
    kept.append(bytearray(b"x") * (1 << 20))

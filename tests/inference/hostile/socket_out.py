"""Calls the host on a port that it is told about."""

import socket

port = int(input())
connection = socket.create_connection(("127.0.0.1", port), timeout=5)
connection.sendall(b"the tests are")
print("told")

"""No test, and no kernel that a test starts, may reach beyond this machine.

On PYTHONPATH (see conftest.py), so that each child interpreter imports it at start-up.
"""

import socket

_connect = socket.socket.connect


def _local_only(self: socket.socket, address: object) -> None:
    host = address[0] if isinstance(address, tuple) else ""
    if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConnectionRefusedError(f"tests run without a network, but something called {address}")
    return _connect(self, address)


socket.socket.connect = _local_only

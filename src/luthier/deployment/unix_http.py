"""HTTP over a Unix socket: how a program of this machine is asked with nothing bound on the network."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path


class SocketConnection(http.client.HTTPConnection):
    """A connection to a program that listens on a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Called by the first request."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))

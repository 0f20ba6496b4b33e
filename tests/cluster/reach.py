"""A server on this machine's loopback, reached from hosts, which have networks of their own."""

import ctypes
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

from tests.cluster.hosts import Host
from tests.s3 import S3

CLONE_NEWNET = 0x40000000


@contextmanager
def reachable(s3: S3, host: Host) -> Iterator[S3]:
    """The server at an address of this host, which all on its network reach."""
    behind = urlsplit(s3.endpoint).port
    assert behind

    class PassOn(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", behind)) as there:
                back = threading.Thread(target=_copy, args=(there, self.request), daemon=True)
                back.start()
                _copy(self.request, there)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def __init__(self) -> None:
            super().__init__((host.address, 0), PassOn, bind_and_activate=False)
            self.socket.close()
            self.socket = _socket_of(host)

    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield replace(s3, endpoint=f"http://{host.address}:{server.socket.getsockname()[1]}")
        server.shutdown()


def _socket_of(host: Host) -> socket.socket:
    """A listening socket on the host's network: sockets stay where they were made, and threads can go there alone."""
    made: list[socket.socket] = []

    def make() -> None:
        network = os.open(f"/proc/{host.pid}/ns/net", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(network, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.create_server((host.address, 0)))
        os.close(network)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):  # one of them is gone
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)

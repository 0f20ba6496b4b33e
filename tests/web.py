"""A web server on loopback that answers range requests, with an ETag, and fails as it is told to."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web(ThreadingHTTPServer):
    """Its `files` by path such as /a.bin; GETs are refused with the first of `refusals` while there is one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.refusals: list[tuple[int, Mapping[str, str]]] = []
        self.knows_ranges = self.knows_versions = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        self._answer(200, self.server.files[self.path])

    def do_GET(self) -> None:
        if self.server.refusals:
            status, headers = self.server.refusals.pop(0)
            self._send(status, b"", headers)
            return
        content, asked = self.server.files[self.path], re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.knows_ranges:
            start, last = map(int, asked.groups())
            self._answer(206, content[start : last + 1])
        else:
            self._answer(200, content)

    def _answer(self, status: int, content: bytes) -> None:
        tag = md5(self.server.files[self.path]).hexdigest()
        self._send(status, content, {"ETag": f'"{tag}"'} if self.server.knows_versions else {})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Web]:
    """Run the server; its address is `url`."""
    with Web() as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()

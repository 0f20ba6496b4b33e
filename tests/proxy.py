"""Something between us and an S3 server that loses answers, forgets conditions, refuses, or has another clock."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3 import KEY, S3, SECRET


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `server`.

    Attributes:
        lost: of so many next conditional puts the answer is lost.
        refusals: the next conditional puts are answered so, HTTP status and S3's code, and not passed on.
        forgets: whether If-None-Match is dropped.
        denies: who has this in its Authorization header is refused as AccessDenied.
        ahead: the server's clock before ours, in what it says of its files.
        conditional: how many conditional puts came.
    """

    daemon_threads = True

    def __init__(self, server: S3) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.behind = urlsplit(server.endpoint).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.lost = self.conditional = 0
        self.refusals: list[tuple[int, str]] = []
        self.forgets = False
        self.denies: str | None = None
        self.ahead = timedelta()

    @property
    def storage(self) -> dict[str, Any]:
        """The run file's section."""
        return {"endpoint": self.endpoint, "region": "us-east-1", "path_style": True}


class _Pass(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        conditional = "If-None-Match" in self.headers
        self.server.conditional += conditional
        if self.server.denies and self.server.denies in self.headers["Authorization"]:
            self._send(403, {}, _error("AccessDenied"))
        elif conditional and self.server.refusals:
            status, code = self.server.refusals.pop(0)
            self._send(status, {}, _error(code))
        else:
            status, headers, content = self._passed_on(body)
            if conditional and self.server.lost:
                self.server.lost -= 1  # the connection ends without an answer
            else:
                self._send(status, headers, content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def _passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name not in ("Connection", "Expect")}
        if self.server.forgets and headers.pop("If-None-Match", None):
            headers.pop("Authorization")  # it signs what was dropped
            request = AWSRequest(self.command, f"{self.server.endpoint}{self.path}", data=body, headers=headers)
            S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1").add_auth(request)
            headers = dict(request.headers.items())
        connection = http.client.HTTPConnection(self.server.behind, timeout=30)
        try:
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        if "Last-Modified" in headers and self.server.ahead:
            theirs = parsedate_to_datetime(headers["Last-Modified"]) + self.server.ahead
            headers["Last-Modified"] = format_datetime(theirs, usegmt=True)
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(content))
        for name, value in headers.items():
            if name not in ("Connection", "Transfer-Encoding"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


@contextmanager
def before(server: S3) -> Iterator[Proxy]:
    """Run the proxy before the server."""
    with Proxy(server) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True).start()
        yield proxy
        proxy.shutdown()

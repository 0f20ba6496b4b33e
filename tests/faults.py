"""An HTTP proxy on loopback that lets storage fail: in front of the S3 server of tests/s3.py, changed while it runs.

with proxied(s3, seed=0) as (flaky, faults):
    faults.share_503 = 0.3
    Store("s3://bucket/x", Storage(**flaky.storage)).write("a", b"x")

Signatures cover the Host header, which is passed on as it is: clients are pointed at the proxy, the server sees that.
Where a header is dropped that a signature covers, the request is signed anew.
"""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3 import KEY, S3, SECRET

STATUS = {"SlowDown": 503, "InternalError": 500, "ExpiredToken": 400, "InvalidToken": 400}
"""HTTP status of S3's error codes, as AWS answers; 403 for others."""
OF_THE_CONNECTION = {"connection", "keep-alive", "expect", "transfer-encoding", "content-length"}
"""Headers that are not passed on, since each side has its own."""


@dataclass
class Faults:
    """What goes wrong, and what has: all of it may be changed and read while requests come.

    Attributes:
        share_503: share of the requests that are refused with 503 SlowDown, by chance.
        delay_s: seconds before every answer.
        down: every connection is reset.
        silent: requests are taken and get no answer, not even the word to go on, for as long as it is set.
        deny: S3's error code that refuses every request, such as ExpiredToken or AccessDenied; off is empty.
        truncate: the bodies of the next so many GETs are cut in the middle while Content-Length says more.
        lose_answer: the next so many PUTs and POSTs are passed on, and the connection is cut instead of an answer.
        refuse_new: HTTP status and S3's error code that refuse the next puts of files that must be new.
        drop_headers: names of request headers that the server does not get, in lower case.
        ahead_s: seconds that the server's clock is ahead of ours, in what it says of a file (Last-Modified).
        only: part of a path; requests for others pass unharmed.
        only_key: the name of a key; requests with others pass unharmed.
        requests: how many there were, by method.
        puts_of_new: how many of them were puts of files that must be new (If-None-Match).
        given: how many faults were given, by the attribute's name.
        log: "METHOD path" of each request, in the order of arrival.
    """

    seed: int = 0
    share_503: float = 0.0
    delay_s: float = 0.0
    down: bool = False
    silent: bool = False
    deny: str = ""
    truncate: int = 0
    lose_answer: int = 0
    refuse_new: list[tuple[int, str]] = field(default_factory=list)
    drop_headers: frozenset[str] = frozenset()
    ahead_s: float = 0.0
    only: str = ""
    only_key: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    puts_of_new: int = 0
    given: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance, self._lock = random.Random(self.seed), threading.Lock()

    def saw(self, method: str, path: str, new: bool) -> None:
        """Count a request."""
        with self._lock:
            self.requests[method] += 1
            self.puts_of_new += new
            self.log.append(f"{method} {path}")

    def gives(self, name: str) -> bool:
        """Whether this request gets the fault, which is counted, and no longer owed when it was a number of times."""
        with self._lock:
            value = getattr(self, name)
            hit = self._chance.random() < value if name == "share_503" else bool(value)
            if hit:
                self.given[name] += 1
                if name in ("truncate", "lose_answer"):
                    setattr(self, name, value - 1)
            return hit


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `upstream`, a host and port, unless the faults say otherwise."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, faults: Faults):
        super().__init__(("127.0.0.1", 0), _Pass)
        self.upstream, self.faults = upstream, faults
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away, or were sent away, are what this is for."""


class _Pass(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"
    timeout = 60

    def handle_expect_100(self) -> bool:
        """Let the client send the body."""
        self._be_silent()
        return super().handle_expect_100()

    def _be_silent(self) -> None:
        faults = self.server.faults
        if self._harmed() and faults.gives("silent"):
            while faults.silent:
                time.sleep(0.02)

    def _harmed(self) -> bool:
        faults = self.server.faults
        return faults.only in self.path and faults.only_key in self.headers.get("Authorization", "")

    def _pass(self) -> None:
        faults = self.server.faults
        self._be_silent()
        new = "If-None-Match" in self.headers
        faults.saw(self.command, self.path, new)
        harmed = self._harmed()
        if harmed and faults.gives("down"):
            self._cut(reset=True)
            return
        body = self._body()
        if harmed and faults.gives("delay_s"):
            time.sleep(faults.delay_s)
        if harmed and faults.gives("deny"):
            self._refuse(STATUS.get(faults.deny, 403), faults.deny)
        elif harmed and faults.gives("share_503"):
            self._refuse(503, "SlowDown")
        elif harmed and new and faults.gives("refuse_new"):
            self._refuse(*faults.refuse_new.pop(0))
        else:
            self._answer(*self._ask(body), harmed)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = _pass

    def _body(self) -> bytes:
        """The request's body, without the framing of chunked transfer; that of aws-chunked is content and stays."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's status, headers and body."""
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._headers(body).items():
                connection.putheader(name, value)
            if body or "Content-Length" in self.headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _headers(self, body: bytes) -> dict[str, str]:
        """What the server gets, signed anew where something signed is dropped."""
        theirs = {name: value for name, value in self.headers.items() if name.lower() not in OF_THE_CONNECTION}
        kept = {name: value for name, value in theirs.items() if name.lower() not in self.server.faults.drop_headers}
        signed = theirs.get("Authorization", "").partition("SignedHeaders=")[2].partition(",")[0].split(";")
        if not {name.lower() for name in theirs.keys() - kept.keys()} & set(signed):
            return kept
        del kept["Authorization"]
        request = AWSRequest(self.command, f"{self.server.url}{self.path}", data=body, headers=kept)
        S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, harmed: bool) -> None:
        faults = self.server.faults
        if harmed and self.command in ("PUT", "POST") and faults.gives("lose_answer"):
            self._cut()
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() == "last-modified" and harmed and faults.gives("ahead_s"):
                value = format_datetime(parsedate_to_datetime(value) + timedelta(seconds=faults.ahead_s), usegmt=True)
            if name.lower() not in OF_THE_CONNECTION or (self.command == "HEAD" and name.lower() == "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if harmed and self.command == "GET" and body and faults.gives("truncate"):
            self.wfile.write(body[: len(body) // 2])
            self._cut()
        else:
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} by the proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self, reset: bool = False) -> None:
        """End the connection now; the other side sees an end, or a reset."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return  # the server closes it, which resets it
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def proxied(s3: S3, seed: int = 0) -> Iterator[tuple[S3, Faults]]:
    """The server as seen through a proxy of its own, and what goes wrong there. Other processes may use
    its endpoint."""
    faults = Faults(seed)
    with Proxy(urlsplit(s3.endpoint).netloc, faults) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True).start()
        try:
            yield replace(s3, endpoint=proxy.url), faults
        finally:
            proxy.shutdown()

"""A local web server that gives images, and everything that a stranger's server might give."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478"
    "9c63a8070000810080d394534a0000000049454e44ae426082"
)
MIB = 1024 * 1024


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    protocol_version = "HTTP/1.1"
    hosts: list[str]

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        name = self.path.strip("/").partition("/")[0]
        with contextlib.suppress(OSError):  # the client gave up
            getattr(self, name)()

    def image(self) -> None:
        self.give(PNG)

    def untyped(self) -> None:
        self.give(PNG, "application/octet-stream")

    def page(self) -> None:
        self.give(b"<html>s3cret</html>", "text/html; charset=utf-8")

    def missing(self) -> None:
        self.give(b"", status=404)

    def zipped(self) -> None:
        self.give(PNG, Content_Encoding="gzip")

    def exact(self) -> None:
        self.give(bytes(10 * MIB))

    def large(self) -> None:
        self.give(bytes(10 * MIB + 1))

    def endless(self) -> None:
        self.begin(Transfer_Encoding="chunked")
        while True:
            self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")

    def drip(self) -> None:
        self.begin(Content_Length="1000")
        for _ in range(1000):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def silent(self) -> None:
        time.sleep(1.5)

    def broken(self) -> None:
        self.begin(Content_Length="1000")
        self.wfile.write(PNG)
        self.close_connection = True

    def loop(self) -> None:
        self.give(b"", status=302, Location="/loop")

    def relative(self) -> None:
        self.give(b"", status=307, Location="image")

    def private(self) -> None:
        port = self.server.server_address[1]
        self.give(b"", status=302, Location=f"http://127.0.0.1:{port}/image")

    def file(self) -> None:
        self.give(b"", status=302, Location="file:///etc/passwd")

    def give(
        self, body: bytes, content_type: str = "image/png", status: int = 200, **headers: str
    ) -> None:
        self.begin(content_type, status, Content_Length=str(len(body)), **headers)
        self.wfile.write(body)

    def begin(self, content_type: str = "image/png", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serve(tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[str]]]:
    """The server's port, and the Host of each request so far."""
    hosts: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hosts": hosts}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1], hosts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

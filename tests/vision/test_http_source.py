"""Servers that misbehave: every answer is compared with what was asked for, within limits of size and time."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from workbench import ModelError
from workbench.models import http_source


class _Misbehaving(BaseHTTPRequestHandler):
    """Answers range requests as the server's `behave` does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        try:
            self.server.behave(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def part(self, content_range, body, **headers):
        self.send_response(206)
        self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def misbehave(behave):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Misbehaving)
    server.daemon_threads = True
    server.behave, server.count = behave, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://user:secret@127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def replaced(handler):
    handler.server.count += 1
    handler.part("bytes 0-7/100", bytes(8), ETag=f'"v{handler.server.count}"')


def grown(handler):
    handler.server.count += 1
    handler.part(f"bytes 0-7/{100 + handler.server.count}", bytes(8))


def endless(handler):
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-7/100")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def dripping(handler):
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-7/100")
    handler.send_header("Content-Length", "8")
    handler.end_headers()
    for _ in range(8):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.3)


def redirected(handler):
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (replaced, 'was replaced on the server while it was read .*"v1" before, "v2" now'),
        (grown, "was replaced on the server while it was read .*101 bytes before, 102 now"),
        (endless, "8 bytes were requested, and the server sends more"),
        (dripping, "of 8 bytes arrived within the limit"),
        (redirected, "TooManyRedirects"),
        (
            lambda handler: handler.part("bytes 1-8/100", bytes(8)),
            r"bytes \[0, 8\) were requested, and the server sends \[1, 9\)",
        ),
        (lambda handler: handler.part("bytes 0-7/" + "9" * 5000, bytes(8)), "does not report the range"),
        (lambda handler: handler.part("bytes 0-7/100", bytes(8), Content_Encoding="gzip"), "sends bytes as 'gzip'"),
        (lambda handler: handler.part("bytes 0-7/100", bytes(5)), "is cut short"),
    ],
)
def test_server_that_misbehaves_raises_model_error(behave, words, monkeypatch):
    monkeypatch.setattr(http_source, "_LONGEST", 1.0)
    with misbehave(behave) as address:
        source = http_source.HttpSource(address)

        def read_twice():
            for _ in range(2):
                _, source._sizes["file"] = source._request("file", 0, 8)
                source.read("file", 0, 8)

        with pytest.raises(ModelError, match=words) as raised:
            read_twice()
    assert "secret" not in str(raised.value)

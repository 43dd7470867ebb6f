"""A real HTTP server for a folder that answers range requests, or fails as configured."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serve(folder: Path, *, ranges: bool = True, fail_first: int = 0, cut: int | None = None):
    """Yield (address, log); the log counts body bytes sent by file, and requests.

    Args:
        ranges: False answers every request with the whole file, as a plain server does.
        fail_first: number of requests answered with status 503 before the server works.
        cut: number of bytes after which a response body is cut off.
    """
    log = {"bytes": {}, "requests": 0, "failures": fail_first}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            log["requests"] += 1
            if log["failures"] > 0:
                log["failures"] -= 1
                self.send_error(503)
                return
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and ranges:
                start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = data[start:stop]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            else:
                body = data
                self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = body if cut is None else body[:cut]
            try:
                self.wfile.write(sent)
                log["bytes"][path.name] = log["bytes"].get(path.name, 0) + len(sent)
            except (BrokenPipeError, ConnectionResetError):
                pass
            if cut is not None and len(sent) < len(body):
                self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()

"""A real HTTP server on loopback that serves a directory, and misbehaves on demand."""

from __future__ import annotations

import math
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer. Several may be combined."""

    status: int | None = None
    """Answer this status, without a file."""
    redirect: str | None = None
    """Answer 302 to this URL."""
    stall: bool = False
    """Say nothing until `FileServer.release` is set; then answer."""
    reset: bool = False
    """Reset the connection in place of an answer."""
    cut: int | None = None
    """Close the connection after so many bytes of the body; its announced length stays."""
    rate: float | None = None
    """Bytes per second of the body."""
    content: bytes | None = None
    """Serve these bytes in place of the file's."""
    ranges: bool = True
    """False: answer a Range with the whole file."""
    content_range: str | None = None
    """Claim this Content-Range in an answer to a Range."""
    length: bool = True
    """False: announce no length; the connection's end is the body's."""


@dataclass
class _Plan:
    path: str | None
    fault: Fault
    left: float


class FileServer:
    """Serves `directory` at `.url` for the length of a `with`, in threads of this process. Paths have no leading /.

    With a `certificate` (a PEM file that holds its key as well) it speaks https.
    """

    def __init__(self, directory: Path, certificate: Path | None = None):
        self.directory = directory
        self.requests: Counter[str] = Counter()
        """Path -> requests."""
        self.sent: Counter[str] = Counter()
        """Path -> bytes of bodies sent."""
        self.ranges: defaultdict[str, list[str | None]] = defaultdict(list)
        """Path -> the Range header of each request."""
        self.targets: list[str] = []
        """Request targets as they came, with their query."""
        self.key: str | None = None
        """Query that a request must have, as that of a signed URL; any other is answered with 403."""
        self.release = threading.Event()
        self.lock = threading.Lock()
        self._plans: list[_Plan] = []
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.files = self
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._http.server_address[1]}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def fail(self, fault: Fault, path: str | None = None, times: int | None = None) -> None:
        """Misbehave at the next `times` requests (None: at all) of a path (None: of all). Faults queue up."""
        with self.lock:
            self._plans.append(_Plan(path, fault, math.inf if times is None else times))

    def behave(self) -> None:
        """Forget all faults."""
        with self.lock:
            self._plans.clear()

    def fault_for(self, path: str) -> Fault:
        """The first fault that is left for a path. Call it with the lock held."""
        for plan in self._plans:
            if plan.path in (None, path) and plan.left > 0:
                plan.left -= 1
                return plan.fault
        return Fault()

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    files: FileServer
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave when they like
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        files = self.server.files
        path = unquote(urlsplit(self.path).path).lstrip("/")
        wanted = self.headers.get("Range")
        with files.lock:
            files.requests[path] += 1
            files.ranges[path].append(wanted)
            files.targets.append(self.path)
            fault = files.fault_for(path)
            refused = files.key is not None and urlsplit(self.path).query != files.key
        if fault.stall:
            files.release.wait()
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionResetError
        if refused:
            self._answer(403, {}, b"", fault)
        elif fault.redirect is not None:
            self._answer(302, {"Location": fault.redirect}, b"", fault)
        elif fault.status is not None:
            self._answer(fault.status, {}, b"", fault)
        elif fault.content is None and not (files.directory / path).is_file():
            self._answer(404, {}, b"", fault)
        else:
            body = (files.directory / path).read_bytes() if fault.content is None else fault.content
            self._serve(body, wanted, fault)

    do_HEAD = do_GET

    def _serve(self, body: bytes, wanted: str | None, fault: Fault) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if not match or not fault.ranges:
            self._answer(200, {}, body, fault)
        elif (start := int(match[1])) >= len(body):
            self._answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"", fault)
        else:
            stop = min(int(match[2]) + 1, len(body)) if match[2] else len(body)
            claim = fault.content_range or f"bytes {start}-{stop - 1}/{len(body)}"
            self._answer(206, {"Content-Range": claim}, body[start:stop], fault)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[: fault.cut]
        step = 65536 if fault.rate is None else max(1, int(fault.rate / 50))
        path = unquote(urlsplit(self.path).path).lstrip("/")
        for at in range(0, len(body), step):
            piece = body[at : at + step]
            with self.server.files.lock:  # counted first, so that nobody has bytes that are not
                self.server.files.sent[path] += len(piece)
            self.wfile.write(piece)
            if fault.rate is not None:
                time.sleep(len(piece) / fault.rate)

    def log_message(self, format: str, *args: object) -> None:
        pass

"""An S3 server that fails, dawdles, breaks off and forgets to answer, in front of one that does not.

`answer` or `plan` says what goes wrong with a request; whatever they leave alone is passed on to the byte.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_ERROR = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
_DRIPS, _PAUSE_S = 6, 0.05


@dataclass(frozen=True)
class Asked:
    """A request: `turn` counts those of the same method and path, from 1, whatever comes between."""

    method: str
    path: str  # "/bucket/key", unquoted, without the query
    turn: int
    query: str
    creates: bool  # only if nothing is there: If-None-Match
    authorization: str


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    answer  not passed on; `status` and `code` instead        lost   passed on, but no answer comes back
    wait    a second late                                     reset  half of the body, then the connection is reset
    drip    the body in drops                                 short  half of the body that was announced, then the end
    """

    kind: str
    status: int = 0
    code: str = ""


class FaultyServer:
    """Forwards requests, with the faults that it is told to make.

    answer  the n-th request -> a status to fail with without a body, 1 to let it wait a second, 0 for no fault
    plan    a request -> its fault, or None
    """

    def __init__(
        self,
        endpoint: str,
        answer: Callable[[int], int] = lambda _: 0,
        plan: Callable[[Asked], Fault | None] = lambda _: None,
    ) -> None:
        self.count = self.faults = 0
        self.made: Counter[str] = Counter()  # faults by kind, or by code
        self._answer, self._plan = answer, plan
        self._turns: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        target = urlsplit(endpoint)
        self.target = (target.hostname or "", target.port)
        handler = type("Handler", (_Handler,), {"outer": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening; connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()

    def fault_of(self, method: str, target: str, creates: bool, authorization: str) -> Fault | None:
        """Count a request and choose what goes wrong with it."""
        path, _, query = target.partition("?")
        path = unquote(path)
        with self._lock:
            self.count += 1
            self._turns[method, path] += 1
            turn = self._turns[method, path]
            status = self._answer(self.count)
        fault = self._plan(Asked(method, path, turn, query, creates, authorization))
        if status:
            fault = Fault("wait") if status == 1 else Fault("answer", status)
        with self._lock:
            self.faults += fault is not None
            if fault is not None:
                self.made[fault.code or fault.kind] += 1
        return fault


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that goes away before its answer is no fault of ours; all else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # answers `Expect: 100-continue`
    outer: FaultyServer

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        creates = self.headers.get("If-None-Match") == "*"
        fault = self.outer.fault_of(self.command, self.path, creates, self.headers.get("Authorization") or "")
        kind = fault.kind if fault else ""
        if fault is not None and kind == "answer":
            self._refuse(fault)
            return
        if kind == "wait":
            time.sleep(1.0)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        with contextlib.closing(HTTPConnection(*self.outer.target, timeout=60)) as upstream:
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            data = response.read()
        if kind == "lost":
            self._reset()
            return
        self._answer(response, data, kind)

    def _refuse(self, fault: Fault) -> None:
        text = _ERROR.format(code=fault.code, message=f"{fault.code} from a faulty server") if fault.code else ""
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, response: HTTPResponse, data: bytes, kind: str) -> None:
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if kind in ("reset", "short"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(_PAUSE_S)
            self.close_connection = True
            if kind == "reset":
                self._reset()
            return
        step = -(-len(data) // _DRIPS) or 1 if kind == "drip" else len(data) or 1
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            if kind == "drip":
                time.sleep(_PAUSE_S)

    def _reset(self) -> None:
        """RST instead of an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

    def log_message(self, *_: object) -> None:
        return

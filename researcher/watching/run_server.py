"""Serving the page of a run to the browsers of this machine alone."""

from __future__ import annotations

import hmac
import re
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from threading import Lock
from typing import Any

from ...errors import FedFactoryError, UsageError
from .run_facts import RunFacts, gather, previews_of, state_file
from .run_page import policy, served_page

LOOPBACK = "127.0.0.1"
OWN_HOSTS = {LOOPBACK, "localhost"}  # names under which a browser of this machine asks; the port may be a tunnel's
SILENT_SECONDS = 10  # after which a connection that asks nothing is closed
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RunServer(ThreadingHTTPServer):
    """Serves the page of one run on the loopback address.

    Everybody on this machine can connect to a port of it, so the page lies below a secret that its address contains. A
    name that leads to this address by a foreign name server is refused by the request's Host header.

    Args:
        experiment: folder of the run.
        port: to listen on; 0: a free one.

    Raises: UsageError if there is no run or if the port is taken; CheckpointError if the run's file is damaged.
    """

    daemon_threads = True

    def __init__(self, experiment: Path, port: int = 0) -> None:
        self.experiment, self.secret, self._lock = experiment, secrets.token_urlsafe(16), Lock()
        self._stamp, self._facts = self._newest(), gather(experiment)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UsageError(
                f"port is {port}, which cannot be used ({error.strerror}); leave it out for a free one"
            ) from None

    @property
    def address(self) -> str:
        """Where a browser of this machine finds the page."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/{self.secret}/"

    def facts(self) -> RunFacts:
        """What is known of the run now; its files are read again if they have changed."""
        with self._lock:
            stamp = self._newest()
            if stamp != self._stamp:
                self._facts, self._stamp = gather(self.experiment), stamp
            return self._facts

    def server_bind(self) -> None:
        """Without the parent's look-up of the machine's name, which may ask a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def _newest(self) -> tuple[object, ...]:
        """Changes when a file of the run does. State files are replaced as a whole, previews are only added."""
        path = state_file(self.experiment)
        known = path.stat() if path.is_file() else None
        return (path, known and (known.st_mtime_ns, known.st_ino, known.st_size), tuple(previews_of(self.experiment)))


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests for three kinds of address. No part of an address becomes part of a path of a file."""

    server: RunServer
    timeout = SILENT_SECONDS

    def do_GET(self) -> None:
        if self._host() not in OWN_HOSTS:
            self._answer(HTTPStatus.FORBIDDEN, "only browsers of this machine are answered")
            return
        secret, slash, rest = self.path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            self._answer(HTTPStatus.NOT_FOUND, "open the whole address that `fedfactory watch` printed")
            return
        try:
            found = self._found(rest)
        except (FedFactoryError, OSError) as error:  # a damaged state, or a folder that was removed
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            return
        if found is None:
            self._answer(HTTPStatus.NOT_FOUND, "there is nothing here")
        else:
            self._answer(HTTPStatus.OK, *found)

    def _found(self, rest: str) -> tuple[str | bytes, str] | None:
        """Content and kind of what is at the part of an address behind the secret; None if nothing is."""
        if rest in ("", "live"):
            return served_page(self.server.facts(), whole=not rest), "text/html; charset=utf-8"
        preview = re.fullmatch(r"previews/(\d{1,9})\.png", rest, re.ASCII)
        path = previews_of(self.server.experiment).get(int(preview[1])) if preview else None
        return (path.read_bytes(), "image/png") if path is not None else None

    def _host(self) -> str:
        """The name under which the browser asks, without the port."""
        return re.sub(r":\d+$", "", self.headers.get("Host", "")).lower()

    def _answer(self, status: HTTPStatus, content: str | bytes, kind: str = "text/plain; charset=utf-8") -> None:
        body = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}
        headers["Content-Security-Policy"] = f"{policy(live=True)}; frame-ancestors 'none'"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "fedfactory"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line would hold the secret."""

"""`rm-gallery watch`: the report of a run as a live page on 127.0.0.1, made again for every request."""

from __future__ import annotations

import errno
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError, one_line
from rm_gallery.training.report.history import read_run
from rm_gallery.training.report.page import page_of

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
REFRESH_S = 10


def serve(run_dir: Path, port: int) -> ThreadingHTTPServer:
    """A server of the page, to be run by `serve_forever`; port 0 takes a free one.

    Raises UserError for a folder that is no run, and for a port that cannot be used.
    """
    read_run(run_dir)

    class Handler(_Handler):
        folder = run_dir

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another program uses it" if is_taken else one_line(error)
        raise UserError(f"--port {port}: cannot be used ({reason}); give another one, or 0 for a free one") from error


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of `/` only, and only by the names of this machine: a page of another site must not read it."""

    folder: Path

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(HTTPStatus.FORBIDDEN, "this page is served to this machine only")
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send_page()

    def _send_page(self) -> None:
        try:
            body = page_of([read_run(self.folder)]).encode()
        except UserError as error:  # the run was deleted
            self.send_error(HTTPStatus.NOT_FOUND, one_line(error).encode("ascii", "replace").decode())
            return
        self.send_response(HTTPStatus.OK)
        headers = {
            "Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(body)), "Refresh": str(REFRESH_S),
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s", format % args)

"""Answers /healthz, /readyz and /metrics."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

_PLAIN: Final = "text/plain; charset=utf-8"
_TIMEOUT_SECONDS: Final = 10


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up before it has its answer is nobody's trouble, and no traceback's."""


class ProbeServer:
    """An HTTP server in threads of its own: it answers even when the event loop does not.

    is_healthy and is_ready give None when all is well, or what is not.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        is_healthy: Callable[[], str | None],
        is_ready: Callable[[], str | None],
    ) -> None:
        answers = {"/healthz": is_healthy, "/readyz": is_ready}

        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT_SECONDS
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif path in answers:
                    trouble = answers[path]()
                    status = HTTPStatus.OK if trouble is None else HTTPStatus.SERVICE_UNAVAILABLE
                    self._answer(status, _PLAIN, f"{trouble or 'ok'}\n".encode())
                else:
                    self._answer(HTTPStatus.NOT_FOUND, _PLAIN, b"not found\n")

            def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Probes come every few seconds and are not worth a line."""

        self._server = _QuietServer((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()

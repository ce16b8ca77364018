"""Parts of the benchmarks that can go wrong without anybody seeing it in their figures."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench.weight_change import time_change


def test_the_time_of_a_weight_change_begins_before_the_change_is_sent() -> None:
    answering = ["one"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(answering[0].encode())

        def log_message(self, *_: object) -> None:
            pass

    def change() -> None:
        answering[0] = "two"
        threading.Event().wait(0.3)  # the split is new long before whoever changed it is told so

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            seconds, failures = time_change(change, server.server_port, "two")
        finally:
            server.shutdown()
    assert 0.3 <= seconds < 5
    assert failures == 0

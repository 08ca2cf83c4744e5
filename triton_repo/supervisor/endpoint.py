"""The supervisor's own HTTP endpoint: /ready, /live, /metrics, and model versions for the holder of its key.

`/ready` is 200 when the last canary of every flow was answered, else 503; `/live` is 200 while the supervisor goes
round; both say why not as JSON. `POST /versions/switch {"version": 2}` with the key answers when it is done.
"""

import hmac
import json
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket

from scaphoid.triton_repo.keys import KEY_HEADER
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.health import Health
from scaphoid.triton_repo.supervisor.ports import bracketed, family

CONTROL = "control.json"  # in the supervisor's folder, for its user alone: where to send a command, and the key
LARGEST_BODY = 4096
JSON = "application/json"
SWITCH = "/versions/switch"
MOST_REQUESTS = 64  # at once
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


class BoundedServer(ThreadingHTTPServer):
    """A thread for each of `MOST_REQUESTS` requests; those beyond are told so at once."""

    daemon_threads = True
    request_queue_size = MOST_REQUESTS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family(address[0])
        self._free = threading.BoundedSemaphore(MOST_REQUESTS)
        super().__init__(address, handler)

    def process_request(self, request: socket, client_address: object) -> None:
        if self._free.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # no thread can be started
                self._free.release()
                raise
        with suppress(OSError):
            request.sendall(BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, *_: object) -> None:
        """A client that leaves early is no event; what fails on this side is answered (`_attempt`)."""


class Endpoint:
    """Listens from `__init__` on, answers until `close`. Raises OSError for a port that cannot be bound."""

    def __init__(
        self, host: str, port: int, health: Health, metrics: Callable[[], bytes], switch: Callable[[int], dict]
    ) -> None:
        self.key = secrets.token_urlsafe(24)
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds for a client to send its request

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    return self._attempt(metrics, "text/plain; version=0.0.4; charset=utf-8")
                if self.path == "/live":
                    live = health.is_live()
                    return self._json(200 if live else 503, {"live": live})
                if self.path != "/ready":
                    return self._json(404, {"error": f"expected /ready, /live or /metrics, got {self.path[:80]}"})
                reason = health.why_not()
                return self._json(
                    503 if reason else 200, {"ready": not reason} | ({"reason": reason} if reason else {})
                )

            def do_POST(self) -> None:
                given = self.headers.get(KEY_HEADER, "").encode(errors="replace")
                if not hmac.compare_digest(given, endpoint.key.encode()):
                    return self._json(403, {"error": "this needs the supervisor's key"})
                try:
                    size = int(self.headers.get("Content-Length", 0))
                    version = json.loads(self.rfile.read(min(max(size, 0), LARGEST_BODY)))["version"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    version = None
                if self.path != SWITCH or type(version) is not int:
                    return self._json(400, {"error": f'expected {SWITCH} with {{"version": NUMBER}}'})
                self._attempt(lambda: encoded(switch(version)), JSON)

            def _attempt(self, answer: Callable[[], bytes], kind: str) -> None:
                """409 for what cannot be done, 500 for a fault of this side."""
                try:
                    body = answer()
                except ServerError as error:
                    return self._json(409, {"error": str(error)})
                except Exception as error:
                    return self._json(500, {"error": f"{type(error).__name__}: {error}"})
                self._send(200, body, kind)

            def _json(self, status: int, content: dict) -> None:
                self._send(status, encoded(content), JSON)

            def _send(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Probes come every few seconds."""

        self._http = BoundedServer((host, port), Handler)
        self.url = f"{bracketed(host)}:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True).start()

    def write_control(self, folder: Path, repository: Path) -> None:
        """Tell this user's commands where to find the supervisor of `repository`."""
        content = {"repository": str(repository.resolve()), "url": self.url, "key": self.key}
        partial = folder / (CONTROL + ".partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file)
        partial.replace(folder / CONTROL)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def encoded(content: dict) -> bytes:
    return json.dumps(content).encode() + b"\n"

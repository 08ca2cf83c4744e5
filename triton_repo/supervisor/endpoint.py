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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scaphoid.triton_repo.keys import KEY_HEADER
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.health import Health

CONTROL = "control.json"  # in the supervisor's folder, for its user alone: where to send a command, and the key
LARGEST_BODY = 4096
SWITCH = "/versions/switch"


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
                    return self._send(200, metrics(), "text/plain; version=0.0.4; charset=utf-8")
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
                if not hmac.compare_digest(self.headers.get(KEY_HEADER, ""), endpoint.key):
                    return self._json(403, {"error": "this needs the supervisor's key"})
                try:
                    size = int(self.headers.get("Content-Length", 0))
                    version = json.loads(self.rfile.read(min(max(size, 0), LARGEST_BODY)))["version"]
                except (ValueError, KeyError, TypeError):
                    version = None
                if self.path != SWITCH or type(version) is not int:
                    return self._json(400, {"error": f'expected {SWITCH} with {{"version": NUMBER}}'})
                try:
                    return self._json(200, switch(version))
                except (ServerError, OSError) as error:
                    return self._json(409, {"error": str(error)})

            def _json(self, status: int, content: dict) -> None:
                self._send(status, json.dumps(content).encode() + b"\n", "application/json")

            def _send(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Probes come every few seconds."""

        self._http = ThreadingHTTPServer((host, port), Handler)
        self._http.daemon_threads = True
        self.url = f"{host}:{self._http.server_port}"
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

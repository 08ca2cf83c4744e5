"""Triton's HTTP endpoint as the supervisor uses it: inference, statistics, and model control, which the restricted API
grants to whoever has a random key (keys.py: who can read it)."""

import base64
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException

from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.triton_repo.keys import KEY_HEADER

REQUEST_TIMEOUT_S = 20.0
LOAD_TIMEOUT_S = 120.0
OK = 200
HELD = ("READY", "LOADING", "UNLOADING")  # states of a model that may have requests in flight


class ServerError(Exception):
    """The server cannot be started or does not answer. One line: what is wrong and what to do."""


class TritonApi:
    """Requests to one server. `key` is the administrator's, `local_key` that of inference (keys.py)."""

    def __init__(self, host: str, port: int) -> None:
        self._address, self.key, self.local_key = (host, port), secrets.token_urlsafe(24), ""

    def request(
        self, method: str, path: str, body: dict | None = None, timeout: float = REQUEST_TIMEOUT_S
    ) -> tuple[int, dict]:
        """Status and decoded body. Raises OSError when the server cannot be reached or hangs."""
        connection = HTTPConnection(*self._address, timeout=timeout)
        try:
            payload = None if body is None else json.dumps(body)
            key = self.local_key if path.endswith("/infer") else self.key
            connection.request(method, path, payload, {KEY_HEADER: key, "Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content[:1] in (b"{", b"[") else {}
        except HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def is_ready(self, model: str) -> bool:
        """What Triton says; it says so of a model whose process is dead, too. Raises OSError."""
        return self.request("GET", f"/v2/models/{model}/ready", timeout=2.0)[0] == OK

    def statistics(self, model: str = "") -> list[dict]:
        """Triton's counts of every version of `model`, by default of all models. Raises OSError."""
        path = f"/v2/models/{model}/stats" if model else "/v2/models/stats"
        return self.request("GET", path)[1].get("model_stats", [])

    def versions(self) -> dict[tuple[str, str], str]:
        """The state of every version of every model that was loaded: READY, LOADING, UNLOADING, UNAVAILABLE."""
        rows = self._control("index", {})
        return {(row["name"], row["version"]): row["state"] for row in rows if row.get("version")}

    def load(self, model: str, config: ModelConfig | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model anew from the repository, or from `config` and `files`. What is loaded serves until then, and
        further when this raises ServerError."""
        parameters = {f"file:{name}": base64.b64encode(content).decode() for name, content in (files or {}).items()}
        if config is not None:
            parameters["config"] = json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))
        self._control(f"models/{model}/load", {"parameters": parameters}, LOAD_TIMEOUT_S)

    def unload(self, model: str) -> None:
        """Unload `model` but not what it runs on. Raises ServerError."""
        self._control(f"models/{model}/unload", {"parameters": {"unload_dependents": False}})

    def await_unloaded(self, models: Sequence[str], version: int, timeout_s: float) -> None:
        """Until Triton has finished every request that `version` of the `models` began. Raises ServerError."""
        deadline = time.monotonic() + timeout_s
        while set(models) & {
            name for (name, v), state in self.versions().items() if v == str(version) and state in HELD
        }:
            if time.monotonic() > deadline:
                raise ServerError(f"requests to version {version} did not end within {timeout_s:g} s")
            time.sleep(0.05)

    def _control(self, path: str, body: dict, timeout: float = REQUEST_TIMEOUT_S) -> list[dict]:
        try:
            status, answer = self.request("POST", f"/v2/repository/{path}", body, timeout)
        except OSError as error:
            raise ServerError(f"Triton does not answer {path} ({error})") from None
        if status != OK:
            raise ServerError(f"Triton refuses {path}: {first_line(answer, status)}")
        return answer or []


def first_line(answer: object, status: int) -> str:
    """What Triton says is wrong."""
    told = answer.get("error") if isinstance(answer, dict) else None
    return str(told or f"HTTP status {status}").splitlines()[0]

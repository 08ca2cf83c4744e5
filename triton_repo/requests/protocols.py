"""Triton's two protocols behind one interface: what is asked of one server, and what its errors mean.

An address is `host:port` or `grpc://host:port` (gRPC, 8001 by default) or `http://host:port` (HTTP, 8000); `grpcs://`
and `https://` speak TLS, with the certificates of `Tls` or the system's. The wheel's server takes HTTP inference from
its own user alone (keys.py), whose key is found here.

A request for inference is never cancelled here and has no time limit of its own: a client that goes away while its
request runs crashes the wheel's server (core 2.51), for every client. Who waits may stop waiting (client.py).
"""

import asyncio
import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import grpc
import numpy as np
import tritonclient.grpc.aio as triton_grpc
import tritonclient.http.aio as triton_http
from tritonclient.utils import InferenceServerException

from scaphoid.trainer.contracts import ENCODED
from scaphoid.triton_repo.keys import GRPC_KEY_HEADER, KEY_HEADER, find_local_key
from scaphoid.triton_repo.supervisor import ports

PROBE_TIMEOUT_S = 5.0
ADDRESS = re.compile(r"(?:(grpcs?|https?)://)?(\[[0-9a-fA-F:]+\]|[^\s/:\[\]]+):(\d{1,5})/?")

REJECTED = "rejected"  # the request is at fault
BUSY = "busy"  # the server refused before it began: a full queue
UNREACHABLE = "unreachable"  # nothing was sent, or no such model
FORBIDDEN = "forbidden"  # the server wants a key that is not here (keys.py)
FAILED = "failed"  # it began and failed, or the connection was lost on the way: nobody knows
NO_TRITON = "what answers there is no Triton server"
NO_KEY = (
    "the key for HTTP is missing or another server's: scaphoid-serve leaves it for its own user; run the client as "
    "that user on that machine, or use gRPC"
)
_HTTP_KINDS = {"400": REJECTED, "403": FORBIDDEN, "404": UNREACHABLE, "413": REJECTED, "503": BUSY}
_GRPC_KINDS = {
    "INVALID_ARGUMENT": REJECTED,
    "NOT_FOUND": UNREACHABLE,
    "RESOURCE_EXHAUSTED": REJECTED,
    "UNAVAILABLE": BUSY,
}


class WireError(Exception):
    """A call that failed; `kind` is one of the words above. `lost`: the connection is gone, so another server may
    answer at this address next."""

    def __init__(self, kind: str, reason: str, lost: bool = False) -> None:
        super().__init__(reason)
        self.kind, self.lost = kind, lost


@dataclass(frozen=True)
class Tls:
    """PEM files: `ca` signed the server's certificate (None: the system's authorities); `certificate` and `key` are
    the client's own, where the server asks for one."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class Served:
    """What a server says about a flow."""

    outputs: tuple[str, ...]
    versions: tuple[str, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Region:
    """Registered shared memory that holds an image, `size` bytes from its start."""

    name: str
    size: int


@dataclass(frozen=True)
class Call:
    """One image for one flow. `image` is its bytes, or where they lie in shared memory."""

    flow: str
    version: str
    outputs: Sequence[str]
    image: bytes | Region
    request_id: str
    priority: int = 0


@dataclass(frozen=True)
class Reply:
    tensors: dict[str, np.ndarray]  # without the batch dimension
    version: str


class Wire(Protocol):
    """One server. All but `close` raise WireError."""

    async def ready(self) -> bool: ...
    async def served(self, flow: str, version: str) -> Served: ...
    async def infer(self, call: Call) -> Reply: ...
    async def register(self, name: str, path: str, size: int, key: str) -> None: ...
    async def unregister(self, name: str, key: str) -> None: ...
    async def close(self) -> None: ...


def wire(address: str, tls: Tls | None, in_flight: int) -> Wire:
    """The connection for `address`; nothing is sent yet. Raises ValueError for an address of another form, OSError for
    certificates that cannot be read, RuntimeError for gRPC in the fork of a process that has used it."""
    found = ADDRESS.fullmatch(address)
    if not found or not 0 < int(found[3]) < 65536:
        raise ValueError(f"a Triton server is HOST:PORT, grpc://HOST:PORT or http://HOST:PORT, got {address!r}")
    scheme, place = found[1] or "grpc", f"{found[2]}:{found[3]}"
    encrypted = tls is not None or scheme in ("grpcs", "https")
    kind = _Http if scheme.startswith("http") else _Grpc
    return kind(place, (tls or Tls()) if encrypted else None, in_flight)


def is_loopback(address: str) -> bool:
    found = ADDRESS.fullmatch(address)
    return bool(found and ports.is_loopback(found[2].strip("[]")))


def port(address: str) -> int:
    return int(ADDRESS.fullmatch(address)[3])


class _Grpc:
    _process: int | None = None  # that gRPC's threads run in

    def __init__(self, place: str, tls: Tls | None, in_flight: int) -> None:
        _Grpc._process = _Grpc._process or os.getpid()
        if _Grpc._process != os.getpid():
            raise RuntimeError("gRPC does not survive a fork: spawn the process instead, or use http://HOST:PORT")
        files = {} if tls is None else {"root_certificates": tls.ca, "private_key": tls.key}
        if tls is not None:
            files |= {"ssl": True, "certificate_chain": tls.certificate}
        self._server = triton_grpc.InferenceServerClient(place, **files)

    async def ready(self) -> bool:
        return await self._ask(self._server.is_server_ready(client_timeout=PROBE_TIMEOUT_S))

    async def served(self, flow: str, version: str) -> Served:
        model = await self._ask(self._server.get_model_metadata(flow, version, client_timeout=PROBE_TIMEOUT_S))
        answer = await self._ask(self._server.get_model_config(flow, version, client_timeout=PROBE_TIMEOUT_S))
        parameters = {name: value.string_value for name, value in answer.config.parameters.items()}
        return Served(tuple(output.name for output in model.outputs), tuple(model.versions), parameters)

    async def infer(self, call: Call) -> Reply:
        given, wanted = _tensors(triton_grpc, call)
        named = {"request_id": call.request_id, "priority": call.priority}
        try:
            result = await self._ask(self._server.infer(call.flow, [given], call.version, wanted, **named))
        except WireError as error:
            if error.kind == BUSY and not await self._is_live():
                raise WireError(FAILED, f"connection lost ({error})", lost=True) from error
            raise
        return _reply(call, result, result.get_response().model_version)

    async def register(self, name: str, path: str, size: int, key: str) -> None:
        headers = {GRPC_KEY_HEADER: key}
        given = {"headers": headers, "client_timeout": PROBE_TIMEOUT_S}
        await self._ask(self._server.register_system_shared_memory(name, path, size, **given))

    async def unregister(self, name: str, key: str) -> None:
        given = {"headers": {GRPC_KEY_HEADER: key}, "client_timeout": PROBE_TIMEOUT_S}
        await self._ask(self._server.unregister_system_shared_memory(name, **given))

    async def close(self) -> None:
        await self._server.close()

    async def _is_live(self) -> bool:
        try:
            return bool(await self._ask(self._server.is_server_live(client_timeout=PROBE_TIMEOUT_S)))
        except WireError:
            return False

    async def _ask(self, call: Any) -> Any:
        try:
            return await call
        except (InferenceServerException, grpc.RpcError) as error:
            raise _grpc_error(error) from error


class _Http:
    def __init__(self, place: str, tls: Tls | None, in_flight: int) -> None:
        self._place, self._key = place, {}
        self._server = triton_http.InferenceServerClient(
            place,
            conn_limit=in_flight + 2,  # the probes have their own
            conn_timeout=None,  # a time limit would close the connection, and that cancels the request
            ssl=tls is not None,
            ssl_context=None if tls is None else _context(tls),
        )

    async def ready(self) -> bool:
        if await self._ask(self._server.is_server_ready(), PROBE_TIMEOUT_S):
            return True
        if not await self._ask(self._server.is_server_live(), PROBE_TIMEOUT_S):
            raise WireError(UNREACHABLE, NO_TRITON)
        return False

    async def served(self, flow: str, version: str) -> Served:
        key = find_local_key(port(self._place)) if is_loopback(self._place) else None
        self._key = {} if key is None else {KEY_HEADER: key}
        with _understood():
            model = await self._ask(self._server.get_model_metadata(flow, version), PROBE_TIMEOUT_S)
            config = await self._ask(self._server.get_model_config(flow, version), PROBE_TIMEOUT_S)
            parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
            return Served(tuple(output["name"] for output in model["outputs"]), tuple(model["versions"]), parameters)

    async def infer(self, call: Call) -> Reply:
        given, wanted = _tensors(triton_http, call)
        named = {"request_id": call.request_id, "priority": call.priority, "headers": dict(self._key)}
        with _understood():
            result = await self._ask(self._server.infer(call.flow, [given], call.version, wanted, **named))
            return _reply(call, result, result.get_response()["model_version"])

    async def register(self, name: str, path: str, size: int, key: str) -> None:
        headers = {KEY_HEADER: key}
        await self._ask(self._server.register_system_shared_memory(name, path, size, headers=headers), PROBE_TIMEOUT_S)

    async def unregister(self, name: str, key: str) -> None:
        await self._ask(self._server.unregister_system_shared_memory(name, headers={KEY_HEADER: key}), PROBE_TIMEOUT_S)

    async def close(self) -> None:
        await self._server.close()

    async def _ask(self, call: Any, timeout_s: float | None = None) -> Any:
        try:
            return await asyncio.wait_for(call, timeout_s) if timeout_s else await call
        except TimeoutError:
            raise WireError(UNREACHABLE, f"no answer within {timeout_s:g} s", lost=True) from None
        except aiohttp.ClientConnectorError as error:
            raise WireError(UNREACHABLE, _line(str(error)), lost=True) from error
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise WireError(FAILED, f"connection lost ({type(error).__name__})", lost=True) from error
        except InferenceServerException as error:
            status = str(error.status())
            kind = _HTTP_KINDS.get(status, FAILED)
            if kind == FORBIDDEN:
                raise WireError(kind, f"{NO_KEY} ({_line(error.message())})", lost=True) from error
            raise WireError(kind, _told(f"HTTP {status}", kind, error.message())) from error


@contextmanager
def _understood() -> Iterator[None]:
    """What another kind of server answers is not JSON, or lacks a field."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WireError(UNREACHABLE, NO_TRITON, lost=True) from error


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _tensors(triton: Any, call: Call) -> tuple[Any, list[Any]]:
    """The input and the requested outputs in the words of one protocol's module."""
    size = call.image.size if isinstance(call.image, Region) else len(call.image)
    given = triton.InferInput(ENCODED.name, [1, size], ENCODED.dtype)
    if isinstance(call.image, Region):
        given.set_shared_memory(call.image.name, size)
    else:
        given.set_data_from_numpy(np.frombuffer(call.image, np.uint8)[None])
    return given, [triton.InferRequestedOutput(name) for name in call.outputs]


def _reply(call: Call, result: Any, version: str) -> Reply:
    tensors = {name: result.as_numpy(name) for name in call.outputs}
    if absent := [name for name, value in tensors.items() if value is None or value.shape[:1] != (1,)]:
        raise WireError(FAILED, f"the server's answer lacks {', '.join(absent)} for one image")
    return Reply({name: value[0] for name, value in tensors.items()}, version)


def _grpc_error(error: InferenceServerException | grpc.RpcError) -> WireError:
    """UNAVAILABLE is the server's word for a full queue, and gRPC's for a connection that is not there or was lost."""
    if isinstance(error, InferenceServerException):
        status, message = str(error.status()), error.message() or ""
    else:
        status, message = str(error.code()), error.details() or ""
    status = status.removeprefix("StatusCode.")
    if status == "DEADLINE_EXCEEDED":  # of a probe
        return WireError(UNREACHABLE, f"no answer within {PROBE_TIMEOUT_S:g} s", lost=True)
    if message.startswith(("failed to connect", "DNS resolution failed")):
        return WireError(UNREACHABLE, _line(message), lost=True)
    kind = REJECTED if "protocol is restricted" in message else _GRPC_KINDS.get(status, FAILED)
    return WireError(kind, _told(status, kind, message))


def _told(status: str, kind: str, message: str | None) -> str:
    reason = _line(message) or status
    return f"refused by the server: {reason}" if kind == REJECTED else f"server error {status}: {reason}"


def _line(message: str | None) -> str:
    """The first line of a server's message, without the ensemble that Triton puts before it, and not too long."""
    line = ((message or "").strip().splitlines() or [""])[0]
    return re.sub(r"^in ensemble '\w+', ", "", line)[:200]

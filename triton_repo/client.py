"""Asynchronous gRPC client of a flow: the bytes of one radiograph in, the flow's outputs by name out.

Needs numpy and tritonclient only, so a workstation without torch can ask a server. A flow's outputs come from the
wiring table; the server skips every step whose outputs are not asked for, so asking for less costs less.
"""

import asyncio
import re
from collections.abc import Sequence

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.configs import ACCEPTED, TRAINED_ON_PHANTOMS, WEIGHTS

PARTS_OUTPUTS = ("parts_probability", "probability_with_parts")
PROBE_TIMEOUT_S = 5.0


class ServerUnavailable(Exception):
    """The server cannot be reached, is not ready, or does not serve the flow: no request can succeed."""


class RequestFailed(Exception):
    """A request failed, not by the image's fault as far as known (engine error, time limit, full queue): retry it."""


class RequestRejected(Exception):
    """The server refused this image (INVALID_ARGUMENT): sending it again cannot help."""


def wanted_outputs(flow: str, parts: bool) -> tuple[str, ...]:
    """Names of the outputs to ask `flow` for. Without `parts` the windows are chosen but not classified: about half the
    arithmetic of MSFM. Raises ValueError on an unknown flow."""
    if flow not in FLOWS:
        raise ValueError(f"unknown flow {flow!r}: expected one of {', '.join(FLOWS)}")
    return tuple(name for name in FLOWS[flow].outputs if parts or name not in PARTS_OUTPUTS)


class FlowClient:
    """A connection to one flow on one server; use as `async with FlowClient(...) as client`.

    `url` is host:port of the server's gRPC endpoint, `outputs` the flow's outputs to ask for, `version` the model
    version (empty: the newest that the server has loaded when `connect` is called), `timeout_s` the limit of each
    request. Once connected, the attribute `version` names the weights too, `1@3f2a9c1b`: a repository assembled anew
    from other weights has version 1 again; and `phantoms` is the generator's version when the weights were trained on
    drawn radiographs, else empty; `accepted` is a line when the artefacts failed the gate of their export, else empty.
    """

    def __init__(self, url: str, flow: str, outputs: Sequence[str], version: str = "", timeout_s: float = 60.0) -> None:
        self.url, self.flow, self.version, self.timeout_s = url, flow, version, timeout_s
        self.phantoms = ""
        self.accepted = ""
        self._model_version = version
        self._outputs = tuple(outputs)
        self._requested = [triton.InferRequestedOutput(name) for name in self._outputs]
        self._in_flight: set[asyncio.Future] = set()

    async def __aenter__(self) -> "FlowClient":
        self._server = triton.InferenceServerClient(self.url)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=self.timeout_s)
        await self._server.close()

    async def connect(self) -> str:
        """Check that the server is ready and serves the flow with the wanted outputs; settle and return the version.

        Raises ServerUnavailable, naming what is missing and what to do.
        """
        try:
            if not await self._server.is_server_ready(client_timeout=PROBE_TIMEOUT_S):
                raise ServerUnavailable(
                    f"the server at {self.url} is up but not ready: wait until its models are loaded"
                )
        except (InferenceServerException, grpc.RpcError) as error:
            raise ServerUnavailable(
                f"no Triton gRPC server answers at {self.url} ({_reason(error)}): start one with scaphoid-serve, "
                "or name another with --url HOST:PORT (the gRPC port, 8001 by default)"
            ) from error
        try:
            asked = (self.flow, self._model_version)
            model = await self._server.get_model_metadata(*asked, client_timeout=PROBE_TIMEOUT_S)
            answer = await self._server.get_model_config(*asked, client_timeout=PROBE_TIMEOUT_S)
        except (InferenceServerException, grpc.RpcError) as error:
            wanted = self.flow + (f" version {self._model_version}" if self._model_version else "")
            raise ServerUnavailable(
                f"the server at {self.url} does not serve flow {wanted} ({_reason(error)})"
            ) from error
        if missing := set(self._outputs) - {output.name for output in model.outputs}:
            raise ServerUnavailable(
                f"flow {self.flow} at {self.url} has no output {', '.join(sorted(missing))}: "
                "server and client are of different releases"
            )
        self._model_version = self._model_version or max(model.versions, key=int, default="")
        weights, self.phantoms, self.accepted = (
            answer.config.parameters[name].string_value for name in (WEIGHTS, TRAINED_ON_PHANTOMS, ACCEPTED)
        )
        self.version = f"{self._model_version}@{weights}" if weights else self._model_version
        return self.version

    async def is_live(self) -> bool:
        """Whether the server still answers at all."""
        try:
            return bool(await self._server.is_server_live(client_timeout=PROBE_TIMEOUT_S))
        except (InferenceServerException, grpc.RpcError):
            return False

    async def predict(self, encoded: bytes) -> dict[str, np.ndarray]:
        """The flow's outputs for the bytes of one PNG, JPEG, BMP, TIFF or PGM file, each without the batch dimension.

        Raises RequestRejected (the image is at fault), RequestFailed (retry it alone) or ServerUnavailable.
        """
        tensor = triton.InferInput(ENCODED.name, [1, len(encoded)], ENCODED.dtype)
        tensor.set_data_from_numpy(np.frombuffer(encoded, np.uint8)[None])
        call = self._server.infer(self.flow, [tensor], self._model_version, outputs=self._requested)
        # Never cancelled, not by Ctrl-C and not by the time limit: that crashes the wheel's Triton (core 2.51), for
        # every client. Leaving the client waits for what is in flight.
        request = asyncio.ensure_future(call)
        self._in_flight.add(request)
        request.add_done_callback(self._settled)
        if not (await asyncio.wait({request}, timeout=self.timeout_s))[0]:
            raise RequestFailed(f"no answer within {self.timeout_s:g} s")
        try:
            result = request.result()
        except (InferenceServerException, grpc.RpcError) as error:
            raise await self._classified(error) from error
        answered = {name: result.as_numpy(name) for name in self._outputs}
        if absent := [name for name, value in answered.items() if value is None or value.shape[:1] != (1,)]:
            raise RequestFailed(f"the server's answer lacks {', '.join(absent)} for one image")
        return {name: value[0] for name, value in answered.items()}

    def _settled(self, request: asyncio.Future) -> None:
        self._in_flight.discard(request)
        if not request.cancelled():
            request.exception()  # looked at, so that asyncio does not complain of a request that came too late

    async def _classified(self, error: InferenceServerException | grpc.RpcError) -> Exception:
        """INVALID_ARGUMENT is the image's fault; anything else is a passing failure while the server lives (UNAVAILABLE
        then means a full queue), and its end when it does not."""
        status = _status(error)
        if status == "INVALID_ARGUMENT":
            return RequestRejected(f"refused by the server: {_reason(error)}")
        if not await self.is_live():
            return ServerUnavailable(f"the server at {self.url} went away ({_reason(error)})")
        if status == "DEADLINE_EXCEEDED":
            return RequestFailed(f"no answer within {self.timeout_s:g} s")
        return RequestFailed(f"server error {status}: {_reason(error)}")


def _status(error: InferenceServerException | grpc.RpcError) -> str:
    if isinstance(error, grpc.RpcError):
        return str(error.code()).removeprefix("StatusCode.")
    return str(error.status()).removeprefix("StatusCode.")


def _reason(error: InferenceServerException | grpc.RpcError) -> str:
    """The first line of the server's message, without the ensemble that Triton puts before it, and not too long."""
    message = error.details() if isinstance(error, grpc.RpcError) else error.message()
    line = ((message or "").strip().splitlines() or [_status(error)])[0]
    return re.sub(r"^in ensemble '\w+', ", "", line)[:200]

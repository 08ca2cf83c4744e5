"""The asynchronous client, which the synchronous one (client.py) runs: one flow, one or more servers.

What fails is told apart: the image was refused (not sent again), the server refused before it began (sent again after a
pause, to another server if there is one, while the time limit lasts), or the request began and failed. Then it is sent
once more, as soon as a server answers a canary again, and with nothing else of this client in flight: no batch-mate
takes it along, and a server that is being restarted is waited for. When it fails again, that is a strike against its
bytes (quarantine.py). Inference changes nothing on the server, so all of that is safe.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.journal import Answer, answered
from scaphoid.triton_repo.configs import ACCEPTED, TRAINED_ON_PHANTOMS
from scaphoid.triton_repo.inputs import Loaded, load_image
from scaphoid.triton_repo.requests.failures import (
    ClientError,
    DeadlineExceeded,
    Quarantined,
    RequestFailed,
    RequestRejected,
    ServerUnavailable,
)
from scaphoid.triton_repo.requests.protocols import (
    BUSY,
    FAILED,
    FORBIDDEN,
    REJECTED,
    Call,
    Reply,
    Tls,
    WireError,
    wire,
)
from scaphoid.triton_repo.requests.quarantine import Quarantine
from scaphoid.triton_repo.requests.retry import InFlight, Servers
from scaphoid.triton_repo.requests.servers import Server
from scaphoid.triton_repo.requests.shared_regions import SharedRegions
from scaphoid.triton_repo.supervisor.canary import IMAGE as CANARY
from scaphoid.triton_repo.supervisor.canary import TIMEOUT_S as CANARY_TIMEOUT_S

PARTS_OUTPUTS = ("parts_probability", "probability_with_parts")
log = logging.getLogger("scaphoid.client")

Image = str | Path | bytes | np.ndarray
T = TypeVar("T")


def wanted_outputs(flow: str, parts: bool) -> tuple[str, ...]:
    """Names of the outputs to ask `flow` for. Without `parts` the windows are chosen but not classified: about half the
    arithmetic of MSFM. Raises ValueError on an unknown flow."""
    if flow not in FLOWS:
        raise ValueError(f"unknown flow {flow!r}: expected one of {', '.join(FLOWS)}")
    return tuple(name for name in FLOWS[flow].outputs if parts or name not in PARTS_OUTPUTS)


@dataclass(frozen=True)
class Outputs:
    """A flow's outputs about one image, by name and without the batch dimension, and where they come from: `version` is
    the model's version and its weights, as in `1@3f2a9c1b`."""

    tensors: dict[str, np.ndarray]
    request_id: str
    version: str
    server: str


@dataclass(frozen=True, kw_only=True)
class Result(Answer):
    """An answer about one radiograph, in its own pixels. `sha256` is of the file as it was given."""

    request_id: str
    model_version: str
    sha256: str


async def predict_each(
    images: Iterable[Image], predict: Callable[[Image], Awaitable[T]], in_flight: int
) -> list[T | ClientError]:
    """What `predict` answers, or the error it ends with, for each of `images`, in their order, `in_flight` at once.
    After a ServerUnavailable nothing more is asked: what is left is given that error. Raises TypeError for a single
    image, ValueError for an `in_flight` that is no whole number >= 1."""
    if isinstance(images, Image):
        raise TypeError(f"predict_all takes many images, got one ({type(images).__name__}): pass a list of them")
    if not isinstance(in_flight, int) or in_flight < 1:
        raise ValueError(f"expected a whole in_flight >= 1, got {in_flight!r}")
    answers: list[T | ClientError | None] = []
    waiting = iter(images)
    gone: ServerUnavailable | None = None

    async def worker() -> None:
        nonlocal gone
        for image in waiting:
            place = len(answers)
            answers.append(gone)
            if gone is None:
                try:
                    answers[place] = await predict(image)
                except ClientError as error:
                    answers[place] = error
                    gone = error if isinstance(error, ServerUnavailable) else gone

    async with asyncio.TaskGroup() as workers:
        for _ in range(in_flight):
            workers.create_task(worker())
    return answers


class AsyncClient:
    """A flow on one or more servers; use as `async with AsyncClient(...) as client`, which raises ServerUnavailable
    unless one of them is ready and serves the flow.

    `servers` are addresses (protocols.py); the least busy healthy one is asked. `parts` False leaves MSFM's windows
    unclassified, `outputs` names the outputs instead. `version` is the model version (empty: the server's newest).
    `timeout_s` is the limit of each image, all tries and pauses included, `retry_s` how much of it may go by while
    servers refuse or cannot be reached (None: all; 0: the first refusal is an error). At most `in_flight` requests run
    at once. `shared_memory` hands images over through shared memory: a server on this machine, of this user.
    `priority` 1 is the highest; 0 leaves it to the server.

    Once connected: `version` names the first server's weights too, `1@3f2a9c1b`; `phantoms` is the generator's
    version when they were trained on drawn radiographs, else empty; `accepted` is a line when the artefacts failed the
    gate of their export, else empty.
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "127.0.0.1:8001",
        flow: str = "msfm",
        *,
        parts: bool = True,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float = 60.0,
        retry_s: float | None = None,
        in_flight: int = 8,
        priority: int = 0,
        shared_memory: bool = False,
        tls: Tls | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.outputs = wanted_outputs(flow, parts) if outputs is None else tuple(outputs)
        if not isinstance(in_flight, int) or in_flight < 1 or not timeout_s > 0:
            raise ValueError(f"expected a whole in_flight >= 1 and timeout_s > 0, got {in_flight!r} and {timeout_s}")
        if not isinstance(priority, int) or priority < 0 or not (retry_s is None or retry_s >= 0):
            raise ValueError(f"expected a whole priority >= 0 and retry_s >= 0, got {priority!r} and {retry_s}")
        self.addresses = (servers,) if isinstance(servers, str) else tuple(servers)
        if not self.addresses:
            raise ValueError("servers: expected at least one address, HOST:PORT")
        self.flow, self.version, self.timeout_s = flow, version, timeout_s
        self.retry_s = timeout_s if retry_s is None else retry_s
        self.phantoms = self.accepted = ""
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self._pinned, self._limit, self._priority, self._tls = version, in_flight, priority, tls
        self._regions = [SharedRegions(address) if shared_memory else None for address in self.addresses]
        self._process: int | None = None  # that it is connected in

    async def __aenter__(self) -> "AsyncClient":
        wires = [wire(address, self._tls, self._limit) for address in self.addresses]
        self._servers = Servers(map(Server, self.addresses, wires, self._regions))
        self._in_flight = InFlight(self._limit)
        self._running: set[asyncio.Task] = set()
        met = await asyncio.gather(*map(self._meeting, self._servers.all), return_exceptions=True)
        if all(isinstance(each, BaseException) for each in met):
            await self._close()
            raise met[0] if len(met) == 1 else ServerUnavailable("; ".join(map(str, met)))
        first = next(server for server in self._servers.all if server.served)
        parameters = first.served.parameters
        self.phantoms, self.accepted = parameters.get(TRAINED_ON_PHANTOMS, ""), parameters.get(ACCEPTED, "")
        newest = self._pinned or max(first.served.versions, key=int, default="")
        self.version = await first.label(self.flow, newest, time.monotonic() + self.timeout_s)
        self._process = os.getpid()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Waits for what is in flight, as long as one image may take: a request is never cancelled (protocols.py)."""
        if self._process != os.getpid():
            return  # the connections are the parent's
        self._process = None
        if self._running:
            await asyncio.wait(self._running, timeout=self.timeout_s)
        await self._close()

    async def _close(self) -> None:
        for server in self._servers.all:
            await server.close()

    def _check_connected(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                "the client is not connected: use it inside `with Client(...) as client` (AsyncClient: `async with`), "
                "in the process that opened it"
            )

    async def predict(self, image: Image) -> Result:
        """The answer about one image. Raises RequestRejected, Quarantined, RequestFailed (DeadlineExceeded among them)
        or ServerUnavailable; RuntimeError unless connected."""
        self._check_connected()
        try:
            loaded = await asyncio.to_thread(load_image, image)
        except RejectedImage as error:
            raise RequestRejected(str(error)) from error
        except ValueError as error:
            raise RequestRejected(f"no file can have this path ({type(error).__name__})") from error
        return self._result(loaded, await self.infer(loaded.encoded))

    def _result(self, loaded: Loaded, outputs: Outputs) -> Result:
        about = {"width": loaded.width, "height": loaded.height, "sha256": loaded.sha256}
        try:
            answer = answered(outputs.tensors)
        except ValueError as error:
            raise RequestFailed(f"the server {error}", outputs.request_id) from None
        return Result(**about, request_id=outputs.request_id, model_version=outputs.version, **answer)

    async def predict_all(self, images: Iterable[Image]) -> list[Result | ClientError]:
        """An answer, or the error it ended with, for each of `images`, in their order. Once no server can be reached
        any more, what is left is given that error without waiting again. Raises TypeError for a single image."""
        self._check_connected()
        return await predict_each(images, self.predict, self._limit)

    async def infer(self, encoded: bytes) -> Outputs:
        """The flow's outputs for the bytes of one PNG, JPEG, BMP, TIFF or PGM file, sent as they are.

        Raises what `predict` raises; every error carries the request's id.
        """
        self._check_connected()
        request_id, deadline = uuid.uuid4().hex, time.monotonic() + self.timeout_s
        if known := self.quarantine.reason(encoded):
            raise Quarantined(f"not sent, it failed every time: {known}", request_id)
        first, failed_at = await self._try(encoded, request_id, deadline)
        if isinstance(first, Outputs):
            return first
        log.warning("request %s failed at %s, tried once more alone: %s", request_id, failed_at.address, first)
        try:
            second, failed_at = await self._try(encoded, request_id, deadline, alone=True, avoid=failed_at)
        except (RequestFailed, ServerUnavailable) as error:
            raise type(error)(f"{first}; then {error}", request_id) from error
        if isinstance(second, Outputs):
            return second
        reason = f"{second} (tried twice, the second time alone)" if second == first else f"{first}; then {second}"
        self.quarantine.strike(encoded, reason)
        raise RequestFailed(reason, request_id)

    async def _try(
        self, encoded: bytes, request_id: str, deadline: float, alone: bool = False, avoid: Server | None = None
    ) -> tuple[Outputs | str, Server]:
        """The outputs, or why the request failed once it had begun; and the server it was sent to. `alone` it goes to
        a server that has just answered a canary. A request that nobody waits for any more keeps its place among those
        in flight until it ends."""
        try:
            places = await self._in_flight.take(alone, deadline)
        except TimeoutError:
            raise self._late(request_id) from None
        refused, task, until = None, None, min(deadline, time.monotonic() + self.retry_s)
        try:
            while (server := await self._next(until, avoid, tried=refused is not None)) is not None:
                sent = time.monotonic()
                try:
                    if server.served is None:
                        await self._in_time(self._meeting(server), deadline, request_id, refused)
                    if alone and not await self._answers(server, deadline):
                        raise WireError(BUSY, f"the server at {server.address} answers nobody at present")
                    task = self._start(server, encoded, request_id)
                    reply = await self._in_time(task, deadline, request_id, refused)
                    server.answered()
                    version = await server.label(self.flow, reply.version, deadline)
                    return Outputs(reply.tensors, request_id, version, server.address), server
                except WireError as error:
                    if error.lost:
                        server.lost()
                    if error.kind == REJECTED:
                        raise RequestRejected(str(error), request_id) from error
                    server.refused(sent)
                    if error.kind == FAILED:
                        return str(error), server
                    refused = error
                    if error.kind == FORBIDDEN:
                        until = sent  # waiting does not help
                except ServerUnavailable as error:
                    server.refused(sent)
                    refused = error
                log.debug("request %s refused by %s: %s", request_id, server.address, refused)
        finally:
            if task is None or task.done():
                self._in_flight.give(places)
            else:
                task.add_done_callback(lambda _: self._in_flight.give(places))
        if isinstance(refused, WireError) and refused.kind == BUSY:
            raise RequestFailed(str(refused), request_id)
        raise ServerUnavailable(f"no server is left: {refused}", request_id)

    async def _next(self, until: float, avoid: Server | None, tried: bool) -> Server | None:
        """Servers.next. Who was lost is met again meanwhile, beside the requests that the others answer."""
        for server in self._servers.all:
            if server.served is None and server.rests_until <= time.monotonic():
                self._meeting(server)
        return await self._servers.next(until, avoid, tried)

    def _meeting(self, server: Server) -> asyncio.Task[None]:
        return server.meeting(self.flow, self._pinned, self.outputs)

    async def _in_time(self, task: asyncio.Task[T], deadline: float, request_id: str, refused: Exception | None) -> T:
        """What the task gives; it goes on when nobody waits for it any more."""
        if not (await asyncio.wait({task}, timeout=max(0.0, deadline - time.monotonic())))[0]:
            raise self._late(request_id, refused)
        return task.result()

    def _late(self, request_id: str, refused: Exception | None = None) -> DeadlineExceeded:
        before = f"; before that: {refused}" if refused else ""
        return DeadlineExceeded(f"no answer within {self.timeout_s:g} s{before}", request_id)

    def _start(self, server: Server, encoded: bytes, request_id: str) -> asyncio.Task[Reply]:
        call = Call(self.flow, self._pinned, self.outputs, encoded, request_id, self._priority)
        task = asyncio.ensure_future(server.infer(call))
        self._running.add(task)
        server.in_flight += 1

        def ended(task: asyncio.Task) -> None:
            self._running.discard(task)
            server.in_flight -= 1
            if not task.cancelled():
                task.exception()  # looked at, so that asyncio does not complain of one that came too late

        task.add_done_callback(ended)
        return task

    async def _answers(self, server: Server, deadline: float) -> bool:
        """Whether the server answers a canary: what fails right after that, alone, fails by the image's doing."""
        task = self._start(server, CANARY, uuid.uuid4().hex)
        done, _ = await asyncio.wait({task}, timeout=max(0.0, min(deadline - time.monotonic(), CANARY_TIMEOUT_S)))
        return bool(done) and task.exception() is None

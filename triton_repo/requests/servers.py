"""One server as a client sees it: what it serves, how it has behaved, and one request to it."""

import asyncio
import random
import time
from collections.abc import Sequence

from scaphoid.triton_repo.configs import WEIGHTS
from scaphoid.triton_repo.requests.failures import ServerUnavailable
from scaphoid.triton_repo.requests.protocols import Call, Reply, Served, Wire, WireError
from scaphoid.triton_repo.requests.shared_regions import NO_REGION, SharedRegions

FIRST_REST_S = 0.05
LONGEST_REST_S = 2.0


class Server:
    """`wire` leads to it, `regions` are the shared memory that its images go through, if any. `served` is None until
    `meet` has asked what it serves, and again once its connection was lost: who answers next may serve other weights.
    """

    def __init__(self, address: str, wire: Wire, regions: SharedRegions | None = None) -> None:
        self.address = address
        self.served: Served | None = None
        self.in_flight = 0
        self.rests_until = 0.0  # time.monotonic
        self._wire, self._regions = wire, regions
        self._labels: dict[str, str] = {}  # model version -> what results are labelled with
        self._refusals = 0  # in a row
        self._meeting: asyncio.Task[None] | None = None

    async def meet(self, flow: str, version: str, outputs: Sequence[str]) -> None:
        """Ask what it serves. Raises ServerUnavailable, naming what is missing and what to do."""
        try:
            if not await self._wire.ready():
                raise ServerUnavailable(
                    f"the server at {self.address} is up but not ready: wait until its models are loaded"
                )
        except WireError as error:
            raise ServerUnavailable(
                f"no Triton server answers at {self.address} ({error}): start one with scaphoid-serve, or name "
                "another: HOST:PORT (the gRPC port, 8001 by default) or http://HOST:PORT"
            ) from error
        try:
            served = await self._wire.served(flow, version)
        except WireError as error:
            wanted = flow + (f" version {version}" if version else "")
            raise ServerUnavailable(f"the server at {self.address} does not serve flow {wanted} ({error})") from error
        if missing := set(outputs) - set(served.outputs):
            raise ServerUnavailable(
                f"flow {flow} at {self.address} has no output {', '.join(sorted(missing))}: "
                "server and client are of different releases"
            )
        if self._regions is not None:
            self._regions.check()
        self.served = served

    def meeting(self, flow: str, version: str, outputs: Sequence[str]) -> asyncio.Task[None]:
        """`meet`, beside whatever is going on; the one that is going on, if there is one."""
        if self._meeting is None or self._meeting.done():
            sent = time.monotonic()

            def ended(task: asyncio.Task) -> None:
                if not task.cancelled() and task.exception() is not None:
                    self.refused(sent)

            self._meeting = asyncio.ensure_future(self.meet(flow, version, outputs))
            self._meeting.add_done_callback(ended)
        return self._meeting

    async def label(self, flow: str, version: str, until: float) -> str:
        """`version` and the hash of its weights, where the server tells it before `until` (time.monotonic)."""
        if version not in self._labels:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    served = await self._wire.served(flow, version)
            except (WireError, TimeoutError):
                return version
            weights = served.parameters.get(WEIGHTS, "")
            self._labels[version] = f"{version}@{weights}" if weights else version
        return self._labels[version]

    async def infer(self, call: Call) -> Reply:
        """Raises WireError, and ServerUnavailable when its shared memory cannot be used."""
        if self._regions is None:
            return await self._wire.infer(call)
        try:
            return await self._regions.infer(self._wire, call)
        except WireError as error:
            if NO_REGION not in str(error):
                raise
        self._regions.forget()  # the server was restarted since
        return await self._regions.infer(self._wire, call)

    def answered(self) -> None:
        self._refusals, self.rests_until = 0, 0.0

    def refused(self, sent: float) -> None:
        """Leave it alone for twice as long as after its last refusal, within a factor of two at random. Refusals of
        requests that were `sent` before that are of the same moment and count once."""
        if sent < self.rests_until:
            return
        rest = min(LONGEST_REST_S, FIRST_REST_S * 2**self._refusals) * random.uniform(0.5, 1.0)
        self._refusals, self.rests_until = min(self._refusals + 1, 16), time.monotonic() + rest

    def lost(self) -> None:
        """The connection is gone."""
        self.served = None
        self._labels.clear()
        if self._regions is not None:
            self._regions.forget()

    async def close(self) -> None:
        if self._meeting is not None:
            self._meeting.cancel()
        if self._regions is not None:
            await self._regions.close(self._wire)
        await self._wire.close()

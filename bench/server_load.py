"""Load on a running Triton server: clients over gRPC, each with one request in flight (a closed loop).

Bounded twice: by a number of requests and by time. Needs numpy and tritonclient only.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import tritonclient.grpc.aio as triton

from scaphoid.bench.timing import Rate
from scaphoid.trainer.contracts import STAGES
from scaphoid.triton_repo.client import AsyncClient, ClientError, ServerUnavailable

WARM_UP = 2  # answers for each client before counting begins
REQUEST_TIMEOUT_S = 120.0

Predict = Callable[[bytes], Awaitable[object]]
Connect = Callable[[], AbstractAsyncContextManager]
"""A new connection to a server: its `infer` is a Predict."""


class LoadError(Exception):
    """The load gave nothing to count. One line: why."""


@dataclass(frozen=True)
class StageTotals:
    """What the server has counted for one model: an execution takes one batch; times are sums, in seconds."""

    images: int = 0
    executions: int = 0
    requests: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    """Each execution once, whatever its batch."""

    def since(self, before: "StageTotals") -> "StageTotals":
        return StageTotals(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    def __add__(self, other: "StageTotals") -> "StageTotals":
        return StageTotals(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Load:
    """`rate` counts answered requests after the warm-up; `failures` holds a line for each request that failed, warm-up
    included; `stages` what the server did for all of them, by model."""

    rate: Rate
    failures: tuple[str, ...]
    stages: dict[str, StageTotals] = field(default_factory=dict)


async def closed_loop(clients: Sequence[Predict], images: Sequence[bytes], requests: int, seconds: float) -> Load:
    """Every client sends its next image when its last one is answered, until `requests` were answered or `seconds` have
    passed since the warm-up, whichever comes first.

    Counting begins at an answer and ends at an answer, with every client busy throughout: neither filling nor draining
    is in the rate. Raises LoadError when nothing was answered after the warm-up.
    """
    warm_up = WARM_UP * len(clients)
    work = cycle(images)
    answers: list[tuple[float, float]] = []  # when, latency
    failures: list[str] = []
    limit_s = time.perf_counter() + REQUEST_TIMEOUT_S + seconds

    def finished() -> bool:
        now = time.perf_counter()
        if len(answers) >= warm_up and now - answers[warm_up - 1][0] > seconds:
            return True
        return len(answers) + len(failures) >= warm_up + requests or now > limit_s

    async def client(predict: Predict) -> None:
        while not finished():
            image, sent = next(work), time.perf_counter()
            try:
                await predict(image)
            except ServerUnavailable:
                raise
            except ClientError as error:
                failures.append(str(error))
                continue
            if not finished():
                now = time.perf_counter()
                answers.append((now, now - sent))

    await asyncio.gather(*(client(predict) for predict in clients))
    counted = answers[warm_up:]
    if not counted:
        reason = failures[0] if failures else f"only {len(answers)} answers in time, all warm-up: allow more seconds"
        raise LoadError(f"nothing to count with {len(clients)} clients: {reason}")
    span = counted[-1][0] - answers[warm_up - 1][0]
    return Load(Rate(len(counted), span, tuple(1e3 * latency for _, latency in counted)), tuple(failures))


def ensemble(url: str, flow: str, wanted: Sequence[str], shared_memory: bool = False) -> Connect:
    """Clients that ask the ensemble `flow` at `url` (gRPC)."""
    given = {"outputs": wanted, "timeout_s": REQUEST_TIMEOUT_S, "shared_memory": shared_memory}
    return partial(AsyncClient, url, flow, **given)


async def server_load(
    url: str, connect: Connect, images: Sequence[bytes], clients: int, requests: int, seconds: float
) -> Load:
    """A closed loop of `clients` connections to the server at `url` (gRPC). Raises ServerUnavailable and LoadError."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connect()) for _ in range(clients)]
        before = await stage_totals(url)
        load = await closed_loop([connection.infer for connection in connections], images, requests, seconds)
        after = await stage_totals(url)
    spent = {name: totals.since(before.get(name, StageTotals())) for name, totals in after.items()}
    return Load(load.rate, load.failures, {name: totals for name, totals in spent.items() if totals.executions})


async def stage_totals(url: str) -> dict[str, StageTotals]:
    """The server's own statistics of every stage's model."""
    async with triton.InferenceServerClient(url) as server:
        statistics = await server.get_inference_statistics()
    return {model.name: _totals(model) for model in statistics.model_stats if model.name in STAGES}


def _totals(model) -> StageTotals:
    compute_ns = sum(
        batch.compute_input.ns + batch.compute_infer.ns + batch.compute_output.ns for batch in model.batch_stats
    )
    queue = model.inference_stats.queue
    return StageTotals(model.inference_count, model.execution_count, queue.count, queue.ns / 1e9, compute_ns / 1e9)

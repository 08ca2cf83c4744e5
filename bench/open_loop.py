"""An open loop: requests are sent at times drawn beforehand, whether or not the earlier ones were answered.

A closed loop hides a slow server, for its clients wait; here a latency counts from the moment the request was due.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from scaphoid.bench.server_load import LoadError


@dataclass(frozen=True)
class OpenLoad:
    """`arrivals_s` [n] are when requests were due, from 0; `latencies_s` [n] until each was answered; `sent_late_s` the
    99th percentile of how late this program sent them."""

    arrivals_s: np.ndarray
    latencies_s: np.ndarray
    sent_late_s: float
    failures: tuple[str, ...]

    def percentile_ms(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.latencies_s, percent))


async def open_load(
    predict: Callable[[bytes], Awaitable[object]], images: Sequence[bytes], arrivals_s: Sequence[float]
) -> OpenLoad:
    """Send the images, over and over, at `arrivals_s`. Raises LoadError when no request was answered."""
    began = time.perf_counter() + 0.1
    due = np.asarray(arrivals_s, np.float64)
    latencies = np.full(len(due), np.nan)
    late = np.zeros(len(due))
    failures: list[str] = []

    async def one(number: int, image: bytes) -> None:
        late[number] = time.perf_counter() - began - due[number]
        try:
            await predict(image)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            return
        latencies[number] = time.perf_counter() - began - due[number]

    async with asyncio.TaskGroup() as tasks:
        for number, image in zip(range(len(due)), cycle(images), strict=False):
            await asyncio.sleep(max(0.0, began + due[number] - time.perf_counter()))
            tasks.create_task(one(number, image))
    sent_late_s = float(np.percentile(late, 99))
    answered = ~np.isnan(latencies)
    if not answered.any():
        raise LoadError(f"no request of the open loop was answered: {failures[0]}")
    return OpenLoad(due[answered], latencies[answered], sent_late_s, tuple(failures))

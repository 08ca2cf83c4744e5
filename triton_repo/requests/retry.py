"""Which server a request goes to, and how many requests are in flight."""

import asyncio
import random
import time
from collections.abc import Iterable

from scaphoid.triton_repo.requests.servers import Server


class Servers:
    """The addresses, the healthy ones first."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self.all = tuple(servers)

    async def next(self, until: float, avoid: Server | None = None, tried: bool = False) -> Server | None:
        """The least busy server that does not rest; when all do, the first to wake, waited for. When that would be
        after `until` (time.monotonic), it is taken at once, or None if one was `tried`. `avoid` is taken only when
        there is no other, and one that is not met yet only when none is: it may never answer."""
        met = [server for server in self.all if server.served is not None] or self.all
        others = [server for server in met if server is not avoid] or met
        now = time.monotonic()
        if awake := [server for server in others if server.rests_until <= now]:
            return min(awake, key=lambda server: server.in_flight)
        first = min(others, key=lambda server: server.rests_until)
        wait = (first.rests_until - now) * random.uniform(1.0, 1.5)  # not everybody at the same moment
        if now + wait >= until:
            return None if tried else first
        await asyncio.sleep(wait)
        return first


class InFlight:
    """Bounds the requests in flight to `limit`; `alone` waits until there is no other and keeps others out."""

    def __init__(self, limit: int) -> None:
        self._limit, self._free = limit, asyncio.Semaphore(limit)
        self._gathering = asyncio.Lock()

    async def take(self, alone: bool, until: float) -> int:
        """Places taken, for `give`. Raises TimeoutError at `until` (time.monotonic)."""
        async with asyncio.timeout(until - time.monotonic()):
            if not alone:
                await self._free.acquire()
                return 1
            async with self._gathering:
                return await self._take_all()

    async def _take_all(self) -> int:
        taken = 0
        try:
            while taken < self._limit:
                await self._free.acquire()
                taken += 1
        except BaseException:
            self.give(taken)
            raise
        return taken

    def give(self, taken: int) -> None:
        for _ in range(taken):
            self._free.release()

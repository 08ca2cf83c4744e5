"""Images handed to a server on the same machine through shared memory (POSIX, /dev/shm) instead of the socket.

A region belongs to one server and one request at a time. Its name is removed from /dev/shm as soon as the server has
opened it, so a client that is killed leaves nothing there; the server lets go when the client closes, or when it ends.
"""

import mmap
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from scaphoid.triton_repo.keys import find_local_key
from scaphoid.triton_repo.requests.failures import ServerUnavailable
from scaphoid.triton_repo.requests.protocols import Call, Region, Reply, Wire, WireError, is_loopback, port

FOLDER = Path("/dev/shm")
LEAST = 2**20  # bytes; regions are powers of two
NO_REGION = "shared memory region"  # in Triton's error when it does not know the name, as after its restart


@dataclass
class _Mapped:
    name: str
    memory: mmap.mmap


class SharedRegions:
    """The regions of one client at one server. Raises ServerUnavailable when the server is not on this machine, or its
    key or the memory cannot be had."""

    def __init__(self, address: str) -> None:
        if not is_loopback(address):
            raise ServerUnavailable(f"shared memory needs a server on this machine, and {address} is not loopback")
        self._address = address
        self._free: list[_Mapped] = []
        self._known: dict[str, _Mapped] = {}

    def check(self) -> None:
        """Raises ServerUnavailable when there is no key."""
        self._key()

    async def infer(self, wire: Wire, call: Call) -> Reply:
        """The request with its image in a region. Raises WireError."""
        region = await self._lend(wire, call.image)
        try:
            return await wire.infer(replace(call, image=region))
        finally:
            if region.name in self._known:
                self._free.append(self._known[region.name])

    async def _lend(self, wire: Wire, image: bytes) -> Region:
        fitting = [region for region in self._free if len(region.memory) >= len(image)]
        if fitting:
            region = min(fitting, key=lambda region: len(region.memory))
            self._free.remove(region)
        else:
            if self._free:  # instead of a smaller one, so that there are never more than requests in flight
                await self._drop(wire, self._free.pop())
            region = await self._create(wire, len(image))
        region.memory[: len(image)] = image
        return Region(region.name, len(image))

    def forget(self) -> None:
        """The server was restarted: it knows none of them any more."""
        self._free.clear()
        self._known.clear()

    async def close(self, wire: Wire) -> None:
        for region in list(self._known.values()):
            await self._drop(wire, region)
        self.forget()

    async def _create(self, wire: Wire, size: int) -> _Mapped:
        size = max(LEAST, 1 << (size - 1).bit_length())
        name = f"scaphoid-client-{os.getpid()}-{uuid.uuid4().hex}"
        path = FOLDER / name
        try:
            region = _Mapped(name, _allocate(path, size))
            await wire.register(name, f"/{name}", size, self._key())
        finally:
            path.unlink(missing_ok=True)
        self._known[name] = region
        return region

    async def _drop(self, wire: Wire, region: _Mapped) -> None:
        self._known.pop(region.name, None)
        with suppress(WireError, ServerUnavailable):  # the server is gone, and its mapping with it
            await wire.unregister(region.name, self._key())

    def _key(self) -> str:
        key = find_local_key(port(self._address))
        if key is None:
            raise ServerUnavailable(
                f"no key for shared memory at {self._address}: it is left by scaphoid-serve for its own user; "
                "run the client as that user on that machine, or leave out shared_memory"
            )
        return key


def _allocate(path: Path, size: int) -> mmap.mmap:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)  # ftruncate promises what is not there: SIGBUS at the first write
            return mmap.mmap(handle, size)
        finally:
            os.close(handle)
    except OSError as error:
        raise ServerUnavailable(
            f"no {size / 2**20:g} MB of shared memory in {path.parent} ({error.strerror}): make room there "
            "(a container: --shm-size), or leave out shared_memory"
        ) from error

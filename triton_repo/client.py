"""The client library: a radiograph in, an answer in its own pixels out. Imports no torch.

    from scaphoid.triton_repo.client import Client

    with Client("127.0.0.1:8001", flow="msfm") as client:
        result = client.predict("hand.png")
        print(result.probability, result.box)

An image is the path or the bytes of a PNG, JPEG, BMP, TIFF, PGM or DICOM file, or uint8 pixels [H, W] with bone bright.
It is checked here first; DICOM files and pixels travel as PGM, which costs the server no decoding. `predict_all` takes
many and gives an answer or an error for each. `AsyncClient` is the same for asyncio.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from scaphoid.triton_repo.requests.async_client import AsyncClient, Image, Outputs, Result, wanted_outputs
from scaphoid.triton_repo.requests.failures import (
    ClientError,
    DeadlineExceeded,
    Quarantined,
    RequestFailed,
    RequestRejected,
    ServerUnavailable,
)
from scaphoid.triton_repo.requests.protocols import Tls
from scaphoid.triton_repo.requests.quarantine import Quarantine

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "Outputs",
    "Quarantine",
    "Quarantined",
    "RequestFailed",
    "RequestRejected",
    "Result",
    "ServerUnavailable",
    "Tls",
    "wanted_outputs",
]

T = TypeVar("T")


class Client:
    """`AsyncClient` without asyncio, with the same parameters, errors and attributes; any thread may call it. Its
    requests run on a thread of their own, which all clients of the process share: Ctrl-C stops the waiting, no request.
    The child of a fork opens its own, over HTTP where its parent has used gRPC, which does not survive that.
    """

    def __init__(self, servers: str | Sequence[str] = "127.0.0.1:8001", flow: str = "msfm", **settings: Any) -> None:
        self._client = AsyncClient(servers, flow, **settings)

    def __enter__(self) -> "Client":
        _wait(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        _wait(self._client.__aexit__())

    def __getattr__(self, name: str) -> Any:
        """`version`, `phantoms`, `accepted`, `quarantine` and the other attributes."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._client, name)

    def predict(self, image: Image) -> Result:
        return _wait(self._client.predict(image))

    def predict_all(self, images: Iterable[Image]) -> list[Result | ClientError]:
        return _wait(self._client.predict_all(images))

    def infer(self, encoded: bytes) -> Outputs:
        return _wait(self._client.infer(encoded))


def _wait(coroutine: Coroutine[Any, Any, T]) -> T:
    with _starting:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="scaphoid-client", daemon=True).start()
    return loop


def _forget_loop() -> None:
    """A forked child has the loop without its thread, and the lock as it was."""
    global _starting
    _starting = threading.Lock()
    _loop.cache_clear()


_starting = threading.Lock()
os.register_at_fork(after_in_child=_forget_loop)

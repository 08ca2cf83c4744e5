"""Triage over the client library: a cheap first call for every radiograph, the whole flow for the uncertain ones.

    fitted = read_band(Path("band.json"))  # of scaphoid.trainer.band
    async with TriageClient("127.0.0.1:8001", fitted) as client:
        triaged = await client.predict("hand.png")
        print(triaged.probability, triaged.whole)

The server skips the steps whose outputs a call does not ask for, so the first call costs the first stage alone. A band
is fitted on validation predictions (trainer/triage.py). An image outside it has a probability and no box: end the band
at 1.0 where every suspicious image needs its box (--boxes). Imports no torch.
"""

from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from scaphoid.trainer.band import FIRST, Band, Fitted
from scaphoid.trainer.journal import weights_of
from scaphoid.triton_repo.client import AsyncClient, ClientError, Image, Outputs, Result
from scaphoid.triton_repo.requests.async_client import predict_each


@dataclass(frozen=True)
class Triaged:
    """`probability` is the verdict's: the first stage's, or with `whole` the flow's score; `result` is what the server
    answered last."""

    probability: float
    whole: bool
    result: Result


class TriageClient:
    """Two clients of one flow, as `async with TriageClient(...) as client`. `settings` are `AsyncClient`'s, and so are
    the errors; each call has their `timeout_s`, and `in_flight` bounds the calls of both together.

    A fitted band brings its flow and parts, and is used for the weights that it was fitted on: `async with` raises
    BandError when the server has others, and what others answer meanwhile (a server that was switched) is asked about
    again, whole. A `Band` alone takes whatever weights there are. Raises ValueError for a flow without a first stage.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        band: Band | Fitted,
        flow: str = "msfm",
        *,
        parts: bool = True,
        **settings: Any,
    ) -> None:
        self.fitted = band if isinstance(band, Fitted) else None
        if self.fitted is not None:
            flow, _, parts = self.fitted.answerer
        self.band = band if self.fitted is None else self.fitted.band
        if flow not in FIRST:
            raise ValueError(f"flow {flow!r} has no first stage to ask: expected one of {', '.join(FIRST)}")
        self.stage = FIRST[flow].removesuffix("_probability")
        self.first = AsyncClient(servers, flow, outputs=(FIRST[flow],), **settings)
        self.full = AsyncClient(servers, flow, parts=parts, **settings)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> "TriageClient":
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.first)
            await stack.enter_async_context(self.full)
            self.full._in_flight = self.first._in_flight  # one limit, and who is tried alone is alone with both
            if self.fitted is not None:
                self.fitted.check_weights(self.full.version)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._open.__aexit__(*error)

    async def predict(self, image: Image) -> Triaged:
        """The answer about one image, from one call or two. Raises what `AsyncClient.predict` raises."""
        first = await self.first.predict(image)
        if self._settles(first.stages[self.stage], first.model_version):
            return Triaged(first.stages[self.stage], False, first)
        whole = await self.full.predict(image)
        return Triaged(whole.score, True, whole)

    async def infer(self, encoded: bytes) -> tuple[Outputs, bool]:
        """The outputs about the bytes of one file, of the first stage or the whole flow, and whether they are the
        latter's. Raises what `AsyncClient.infer` raises."""
        first = await self.first.infer(encoded)
        if self._settles(first.tensors[f"{self.stage}_probability"].item(), first.version):
            return first, False
        return await self.full.infer(encoded), True

    def _settles(self, probability: float, version: str) -> bool:
        """Whether the first stage's answer is the last word."""
        known = self.fitted is None or weights_of(version) == self.fitted.answerer.weights
        return known and not self.band.holds(probability)

    async def predict_all(self, images: Iterable[Image], in_flight: int = 8) -> list[Triaged | ClientError]:
        """An answer, or the error it ended with, for each of `images`, in their order; at most `in_flight` at once, and
        the clients' own. Otherwise as `AsyncClient.predict_all`."""
        self.full._check_connected()
        return await predict_each(images, self.predict, in_flight)

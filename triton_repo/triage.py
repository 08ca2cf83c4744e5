"""Triage over the client library: a cheap first call for every radiograph, the whole flow for the uncertain ones.

    async with TriageClient("127.0.0.1:8001", Band(0.1, 0.8)) as client:
        triaged = await client.predict("hand.png")
        print(triaged.probability, triaged.whole)

The server skips the steps whose outputs a call does not ask for, so the first call costs the first stage alone. Fit the
band on validation predictions (trainer/triage.py). An image outside the band has a probability and no box: end the band
at 1.0 where every suspicious image needs its box. Imports no torch.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from scaphoid.trainer.triage import FIRST, Band
from scaphoid.triton_repo.client import AsyncClient, ClientError, Image, Result


@dataclass(frozen=True)
class Triaged:
    """`probability` is the verdict's: the first stage's, or with `whole` the flow's score; `result` is what the server
    answered last."""

    probability: float
    whole: bool
    result: Result


class TriageClient:
    """Two clients of one flow, as `async with TriageClient(...) as client`. `settings` are `AsyncClient`'s, and so are
    the errors. Raises ValueError for a flow without a first stage."""

    def __init__(
        self, servers: str | Sequence[str], band: Band, flow: str = "msfm", *, parts: bool = True, **settings: Any
    ) -> None:
        if flow not in FIRST:
            raise ValueError(f"flow {flow!r} has no first stage to ask: expected one of {', '.join(FIRST)}")
        self.band, self._stage = band, FIRST[flow].removesuffix("_probability")
        self.first = AsyncClient(servers, flow, outputs=(FIRST[flow],), **settings)
        self.full = AsyncClient(servers, flow, parts=parts, **settings)

    async def __aenter__(self) -> "TriageClient":
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.first)
            await stack.enter_async_context(self.full)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._open.__aexit__(*error)

    async def predict(self, image: Image) -> Triaged:
        """The answer about one image, from one call or two. Raises what `AsyncClient.predict` raises."""
        first = await self.first.predict(image)
        probability = first.stages[self._stage]
        if not self.band.holds(probability):
            return Triaged(probability, False, first)
        whole = await self.full.predict(image)
        return Triaged(whole.score, True, whole)

    async def predict_all(self, images: Iterable[Image], in_flight: int = 8) -> list[Triaged | ClientError]:
        """An answer, or the error it ended with, for each of `images`, in their order."""
        images = list(images)
        answers: list[Triaged | ClientError] = [ClientError("not asked")] * len(images)
        waiting = iter(range(len(images)))

        async def worker() -> None:
            for place in waiting:
                try:
                    answers[place] = await self.predict(images[place])
                except ClientError as error:
                    answers[place] = error

        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return answers

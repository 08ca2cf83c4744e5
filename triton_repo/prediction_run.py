"""Carries many radiographs through one flow: bounded requests in flight, lines written as they come, resumable.

One reader loads, checks and hashes the files in order, a few ahead; `concurrency` workers send them through the client,
which tries again what may succeed. One bad image is one line.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.journal import Journal, Prediction, answered
from scaphoid.triton_repo.client import AsyncClient, ClientError, Outputs, RequestRejected, ServerUnavailable
from scaphoid.triton_repo.inputs import Loaded, Rejection, Source, load
from scaphoid.triton_repo.triage import TriageClient


@dataclass
class PredictionRun:
    """The state of one run. `finished` is called with every prediction, rejections and those of an earlier run
    included; `predictions` holds them by image."""

    client: AsyncClient  # with a triage, its client of the whole flow
    journal: Journal
    parts: bool
    threshold: float
    concurrency: int
    salt: bytes  # of the pseudonyms of DICOM studies
    finished: Callable[[Prediction], None]
    triage: TriageClient | None = None
    predictions: dict[str, Prediction] = field(default_factory=dict)
    _first_with: dict[str, Source] = field(default_factory=dict)  # content hash -> the first source that has it

    def reject(self, rejections: Iterable[Rejection]) -> None:
        """Record inputs that were rejected before anything was read."""
        for rejection in rejections:
            original = None if rejection.duplicate_of is None else str(rejection.duplicate_of)
            record = self._record(rejection.path, rejection.study, "rejected", rejection.reason, duplicate_of=original)
            if record.image == original:  # the very same path given twice: its line is that of its prediction
                self.finished(record)
            else:
                self._finish(record)

    async def predict(self, sources: Sequence[Source]) -> None:
        """Predict all `sources`. Raises ServerUnavailable when the server is gone and OSError when the
        journal cannot be written; what was finished by then is kept."""
        ready: asyncio.Queue[tuple[Source, Loaded] | None] = asyncio.Queue(self.concurrency)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.concurrency):
                    tasks.create_task(self._send_all(ready))
                async with aclosing(self._load_all(sources)) as loading:
                    async for item in loading:
                        await ready.put(item)
                for _ in range(self.concurrency):
                    await ready.put(None)
        except* (ServerUnavailable, OSError) as group:  # OSError: the journal cannot be written
            raise group.exceptions[0] from None

    async def _load_all(self, sources: Sequence[Source]) -> AsyncGenerator[tuple[Source, Loaded], None]:
        """The sources that still need a request, in order, read a few ahead of their turn on other threads."""
        ahead: deque[tuple[Source, asyncio.Task[Loaded]]] = deque()
        remaining = iter(sources)
        try:
            while True:
                while len(ahead) < self.concurrency and (following := next(remaining, None)):
                    ahead.append((following, asyncio.create_task(asyncio.to_thread(load, following, self.salt))))
                if not ahead:
                    return
                source, loading = ahead.popleft()
                try:
                    loaded = await loading
                except RejectedImage as error:
                    self._finish(self._record(source.path, source.study, "rejected", str(error)))
                    continue
                if not self._settled(source, loaded):
                    yield source, loaded
        finally:
            for _, loading in ahead:
                loading.cancel()

    def _settled(self, source: Source, loaded: Loaded) -> bool:
        """Finish what needs no request: a repeated radiograph, and one that an earlier run has finished."""
        original = self._first_with.setdefault(loaded.sha256, source)
        if original is not source:
            reason = f"the same content as {original.path}, predicted once"
            self._finish(self._record(source.path, loaded, "rejected", reason, duplicate_of=str(original.path)))
            return True
        asked = (self.client.flow, self.client.version, self.parts, self._band)
        known = self.journal.find(str(source.path), loaded.sha256, *asked)
        if known is not None:
            self._finish(known.judged(self.threshold))
        return known is not None

    async def _send_all(self, ready: "asyncio.Queue[tuple[Source, Loaded] | None]") -> None:
        while (item := await ready.get()) is not None:
            await self._send(*item)

    async def _send(self, source: Source, loaded: Loaded) -> None:
        try:
            outputs, answer = await self._ask(loaded.encoded)
        except ServerUnavailable:
            raise
        except (ClientError, ValueError) as error:  # ValueError: an answer that is not finite
            status = "rejected" if isinstance(error, RequestRejected) else "failed"
            reason = f"the server {error}" if isinstance(error, ValueError) else str(error)
            request_id = getattr(error, "request_id", None)
            self._finish(self._record(source.path, loaded, status, reason, request_id=request_id))
        else:
            known = {"request_id": outputs.request_id, "model_version": outputs.version, **answer}
            self._finish(self._record(source.path, loaded, "ok", None, **known).judged(self.threshold))

    async def _ask(self, encoded: bytes) -> tuple[Outputs, dict[str, Any]]:
        """What the server answered, and the line's fields about it. Raises ClientError, and ValueError for an answer
        that is not finite."""
        if self.triage is None:
            outputs, whole = await self.client.infer(encoded), True
        else:
            outputs, whole = await self.triage.infer(encoded)
        answer = answered(outputs.tensors) | {"whole": whole}
        if not whole:
            answer["probability"] = answer["stages"][self.triage.stage]
        return outputs, answer

    @property
    def _band(self) -> list[float] | None:
        return None if self.triage is None else list(self.triage.band)

    def _record(self, path: object, about: Loaded | str, status: str, reason: str | None, **known: Any) -> Prediction:
        """A line about `path`; `about` is what was loaded, or only the study where loading did not get that far."""
        if isinstance(about, Loaded):
            known |= {"sha256": about.sha256, "width": about.width, "height": about.height}
        known.setdefault("model_version", self.client.version)
        return Prediction(
            image=str(path),
            study=about.study if isinstance(about, Loaded) else about,
            flow=self.client.flow,
            parts=self.parts,
            status=status,
            threshold=self.threshold,
            reason=reason,
            band=self._band,
            **known,
        )

    def _finish(self, prediction: Prediction) -> None:
        self.journal.append(prediction)
        self.predictions[prediction.image] = prediction
        self.finished(prediction)

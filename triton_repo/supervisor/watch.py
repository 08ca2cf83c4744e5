"""Looks after a running server: its processes, its canaries, and its recovery.

A backend process that died is seen within a second, by its process id; a server that hangs, by a canary that comes back
late while nobody else is answered either.
"""

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaphoid.export.artefacts import ManifestError
from scaphoid.export.lock import InUse
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.canary import TIMEOUT_S, CanaryLate
from scaphoid.triton_repo.versioning import versions

if TYPE_CHECKING:
    from scaphoid.triton_repo.supervisor.server import Server

TICK_S = 0.5  # between looks at the server's processes
LONGEST_WAIT_S = 60.0  # between attempts to recover a server that fails again and again
LOCK_WAIT_S = 10.0  # for a change of the repository to finish, before the next attempt
STEADY_S = 120.0  # ready for so long, and the next fault is the first again


@dataclass(frozen=True)
class Fault:
    """What is wrong with the server: `kind` for counting, `line` for reading."""

    kind: str
    line: str


@dataclass
class Backoff:
    """How long to wait before the next start: not at all, then 1 s, 2 s, 4 s ... while it keeps failing."""

    attempts: int = 0
    ready_since: float = -math.inf

    def fault(self, now: float) -> None:
        """The server has failed."""
        if now - self.ready_since >= STEADY_S:
            self.attempts = 0

    def delay(self) -> float:
        """Before this attempt."""
        self.attempts += 1
        return min(2.0 ** (self.attempts - 2), LONGEST_WAIT_S) if self.attempts > 1 else 0.0


class Watcher:
    """Looks after `server`."""

    def __init__(self, server: "Server") -> None:
        self.server, self._backoff = server, Backoff(ready_since=time.monotonic())
        self._canary_fault: Fault | None = None

    def watch(self, stop: threading.Event, interval_s: float) -> None:
        """Until `stop` is set, look after the processes, send canaries every `interval_s` seconds, and recover from
        what is found. A process that it starts anew ends with the thread that runs this."""
        health = self.server.health
        health.expect_canaries(interval_s, patience_s=TIMEOUT_S * len(self.server.flows))
        threading.Thread(target=self.send_canaries, args=(stop, interval_s), daemon=True).start()
        while not stop.wait(TICK_S):
            health.beat()
            if self.server.serving.is_set() and (fault := self._fault()):  # else it is being stopped
                self.recover(fault, stop)

    def _fault(self) -> Fault | None:
        process = self.server.process
        if (code := process.exit_code) is not None:
            return Fault("server_died", f"the server ended with exit code {code}: {process.errors}")
        if model := process.dead_backend():
            return Fault("backend_died", f"the backend process of {model} died")
        return self._canary_fault

    def send_canaries(self, stop: threading.Event, interval_s: float) -> None:
        """Until `stop` is set; a flow that does not answer its canary is a fault of the server that it was sent to."""
        server, answered = self.server, Counter()  # successes of each flow up to its previous check
        while not stop.wait(interval_s):
            generation = server.generation
            for flow in server.flows:
                if not server.serving.is_set():
                    break
                try:
                    answered[generation, flow] = self._check(flow, answered[generation, flow])
                except ServerError as error:
                    kind = "canary_late" if isinstance(error, CanaryLate) else "canary_failed"
                    if server.serving.is_set() and server.generation == generation:
                        self._canary_fault = Fault(kind, str(error))
                    break

    def _check(self, flow: str, answered: int) -> int:
        """The flow's count of successes now. A late canary is no fault while others are `answered`: it waits behind
        them in the queue. Raises ServerError."""
        try:
            self.server.canary(flow)
        except CanaryLate as error:
            if (now := self._successes(flow)) <= answered:
                self.server.health.failed(flow, str(error))
                raise
            self.server.health.busy(flow)
            return now
        return self._successes(flow)

    def _successes(self, flow: str) -> int:
        """Requests that `flow` has answered since it was loaded; 0 when the server does not tell."""
        try:
            return sum(version["inference_stats"]["success"]["count"] for version in self.server.api.statistics(flow))
        except OSError:
            return 0

    def recover(self, fault: Fault, stop: threading.Event) -> None:
        """Start the process anew, as often as it takes. Loading the dead model again is no way out: Triton waits for
        ever for the process that died."""
        server, began = self.server, time.monotonic()
        server.serving.clear()
        server.health.not_serving(f"{fault.line}; it is being restarted", fault.kind)
        server.report(f"{fault.line}; restarting the server", event="fault", kind=fault.kind, level="error")
        self._backoff.fault(began)
        while True:
            server.process.end(grace_s=0)  # so that clients get their errors now
            self._canary_fault = None
            if delay := self._backoff.delay():
                server.report(
                    f"it failed before: waiting {delay:g} s", event="back_off", seconds=delay, level="warning"
                )
                if self._wait(delay, stop):
                    return
            try:
                with versions.starting(server.repository, LOCK_WAIT_S):
                    server.launch(stop)
                break
            except InUse as waiting:  # the server has not failed again: ready to start as soon as it is released
                if stop.is_set():
                    return
                self._backoff.attempts -= 1
                server.health.beat()
                server.health.not_serving(f"not recovered: {waiting}")
                server.report(f"not recovered: {waiting}", event="in_use", level="error")
            except (ManifestError, ServerError, OSError) as failure:
                if stop.is_set():
                    return
                server.health.not_serving(f"not recovered: {failure}", "start_failed")
                server.report(f"not recovered: {failure}", event="start_failed", level="error")
        seconds = time.monotonic() - began
        self._backoff.ready_since = time.monotonic()
        server.health.recovered(seconds)
        server.report(f"recovered in {seconds:.1f} s", event="recovered", seconds=round(seconds, 1))

    def _wait(self, seconds: float, stop: threading.Event) -> bool:
        """Whether `stop` was set meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.server.health.beat()
            if stop.wait(TICK_S):
                return True
        return False

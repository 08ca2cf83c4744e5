"""What the supervisor knows of its server: whether every flow's last canary was answered, and what went wrong so far.

Readiness is this, not an open port: Triton stays ready when a backend's process has died.
"""

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace

STARTING, STOPPING = "starting", "stopping: requests in flight finish, new ones go elsewhere"
FAULTS = ("server_died", "backend_died", "canary_failed", "canary_late", "start_failed")
STALE_CANARIES = 3.0  # intervals without an answer after which nobody knows whether the flow answers
BEAT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Canary:
    """The last canary of a flow; the time is of `time.monotonic`."""

    answered: bool = False
    error: str = ""
    latency_s: float = math.nan
    at_s: float = -math.inf
    failures: int = 0  # so far


class Health:
    """Written by the supervisor's threads, read by the endpoint's."""

    def __init__(self, flows: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._why_not = STARTING
        self._beat = time.monotonic()
        self._canary_age_s = math.inf  # where nobody watches none is expected
        self.canaries = {flow: Canary() for flow in flows}
        self.faults: Counter[str] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self.restarts = 0
        self.recovery_s = math.nan

    def why_not(self) -> str:
        """Empty when ready, else the reason, one line."""
        with self._lock:
            if self._why_not:
                return self._why_not
            oldest = time.monotonic() - self._canary_age_s
            for flow, last in self.canaries.items():
                if not last.answered:
                    return last.error or f"flow {flow} has not answered its canary yet"
                if last.at_s < oldest:
                    return f"the last canary of flow {flow} is too long ago"
            return ""

    def expect_canaries(self, interval_s: float, patience_s: float) -> None:
        """Every `interval_s` seconds from now on, and `patience_s` later at most."""
        self._canary_age_s = STALE_CANARIES * interval_s + patience_s

    def is_live(self) -> bool:
        """Whether the supervisor itself still goes round."""
        return time.monotonic() - self._beat < BEAT_TIMEOUT_S

    def beat(self) -> None:
        self._beat = time.monotonic()

    def serving(self) -> None:
        with self._lock:
            self._why_not = ""

    def not_serving(self, reason: str, fault: str = "") -> None:
        """Not ready from now on; `fault` is the kind of fault that is counted."""
        with self._lock:
            self._why_not = reason
            self.faults[fault] += bool(fault)

    def answered(self, flow: str, latency_s: float) -> None:
        self._set(flow, answered=True, error="", latency_s=latency_s)

    def busy(self, flow: str) -> None:
        """Its canary waits behind requests that are being answered: as well as before."""
        self._set(flow)

    def failed(self, flow: str, error: str) -> None:
        self._set(flow, answered=False, error=error, failures=self.canaries[flow].failures + 1)

    def request_refused(self, model: str, status: str) -> None:
        with self._lock:
            self._refused[model, status] += 1

    def refused(self) -> Counter[tuple[str, str]]:
        """Requests that a backend refused, by model and status."""
        with self._lock:
            return self._refused.copy()

    def _set(self, flow: str, **changes: object) -> None:
        with self._lock:
            self.canaries[flow] = replace(self.canaries[flow], at_s=time.monotonic(), **changes)

    def recovered(self, seconds: float) -> None:
        with self._lock:
            self.restarts += 1
            self.recovery_s, self._why_not = seconds, ""

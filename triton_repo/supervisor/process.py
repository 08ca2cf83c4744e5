"""One process of Triton: started, listened to, its backend processes looked after, ended with all that it left."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from scaphoid.triton_repo.supervisor.request_log import parse

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PREFIX = "scaphoid-server-"  # then the supervisor's PID
STOP_TIMEOUT_S = 30.0  # Triton's own exit takes up to 7 s on an idle machine
TRITON_ERROR = re.compile(r"E\d{4} |error: |.*error while loading shared libraries")
NO_ERROR = (  # though Triton calls it one
    *("CudaDriverHelper", "CUDA driver version is insufficient"),  # there is none, and none is needed
    "model_config_content_name_ is empty",  # of every model that is loaded from a request, as a switch does
)
# Ends the server when the supervisor's thread that started it ends, however it ends (PR_SET_PDEATHSIG, SIGTERM).
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


class TritonProcess:
    """`command` is Triton's; `prefix` that of its shared memory; `request_failed` receives what the backends say of
    every request that they refuse. It ends with the thread that calls `launch`."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        prefix: str,
        request_failed: Callable[[dict], None] = lambda event: None,
    ) -> None:
        self._command, self._environment, self._prefix = command, environment, prefix
        self._request_failed = request_failed
        self._errors: deque[str] = deque(maxlen=3)
        self._running: subprocess.Popen | None = None
        self._models: dict[int, str] = {}  # of every backend process that was seen alive
        self._zombies: set[int] = set()

    @property
    def pid(self) -> int:
        return self._running.pid

    def launch(self) -> None:
        """Start Triton; what it prints is read, not kept."""
        self._errors.clear()
        self._models.clear()
        self._zombies.clear()
        self._running = subprocess.Popen(
            [sys.executable, "-S", "-c", DIE_WITH_PARENT, *self._command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self._environment},
            start_new_session=True,  # Ctrl-C is for the supervisor
        )
        threading.Thread(target=self.listen, args=(self._running.stdout,), daemon=True).start()

    def listen(self, output: IO[bytes]) -> None:
        """Keep what Triton itself calls an error and pass on what the backends say of requests. Other lines are
        dropped: what a library prints may quote the image that it worked on."""
        with suppress(ValueError), output:  # closed while reading: the process is gone
            for raw in output:
                line = raw.decode(errors="replace").strip()
                if event := parse(line):
                    self._request_failed(event)
                elif TRITON_ERROR.match(line) and not any(noise in line for noise in NO_ERROR):
                    self._errors.append(line)

    @property
    def errors(self) -> str:
        """The last errors of this start, on one line."""
        return " | ".join(self._errors) or "its log names no error"

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._running.poll()

    def note_backends(self) -> None:
        """Remember which model each backend process serves: a dead one does not tell."""
        unknown = [pid for pid in children(self.pid) if pid not in self._models]
        self._models |= {pid: model for pid in unknown if (model := model_of(pid))}

    def dead_backend(self) -> str | None:
        """The model whose backend process has died, if one has: call this often. Triton never waits for a process that
        it did not end itself, so that it stays a zombie; one that Triton ended is one for a moment only."""
        self.note_backends()
        zombies = {pid for pid in children(self.pid) if _state(pid) == "Z"}
        dead, self._zombies = zombies & self._zombies, zombies
        return next((self._models.get(pid, "a model") for pid in dead), None)

    def end(self, grace_s: float = STOP_TIMEOUT_S) -> None:
        """End it and everything it started, and remove its shared memory. Within `grace_s` it finishes the requests in
        flight. Safe to call twice."""
        process, self._running = self._running, None
        if process is None:
            return
        if grace_s:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # itself if it hangs, and backend processes that outlived it
        process.wait()
        for left in SHARED_MEMORY.glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)


def children(pid: int) -> list[int]:
    """The processes that any thread of `pid` started, dead ones included until they are waited for."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread ended meanwhile
            found += map(int, thread.read_text().split())
    return found


def model_of(pid: int) -> str:
    """The model that a backend process serves; its command names REPOSITORY/MODEL/VERSION/model.py. Empty while it
    does not: a process that was just forked has its parent's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return Path(words[1]).parents[1].name
    except (OSError, IndexError):
        return ""


def started_at(pid: int | str) -> str:
    """When a process began, in ticks since the machine did; empty when it is gone. With the PID it names one process,
    for a PID alone is given to others again, and in a container always to the same."""
    return _stat(pid, 19)


def _state(pid: int) -> str:
    """One letter, Z for a zombie; empty when it is gone."""
    return _stat(pid, 0)


def _stat(pid: int | str, field: int) -> str:
    """A field of /proc/PID/stat, counted from the one after the command, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return ""

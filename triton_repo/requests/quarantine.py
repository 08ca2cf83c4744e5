"""Images that fail every time, so that nobody sends them again: known by the hash of their bytes, never by a name.

A strike is a request that failed twice, the second time with nothing else of its client in flight and right after the
server had answered a canary: then it is the image, whatever the server says, even if that took the server down. One
strike may be another client's doing; with STRIKES the image is not sent any more. The guard before decoding refuses
what is known to be bad; this is for what is not known yet.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path

STRIKES = 2
_BEGINNING = '{"sha256": "'  # of a line
log = logging.getLogger("scaphoid.client")


class Quarantine:
    """In memory, and with `path` in a file of JSON lines, one a strike, that only grows and that several processes may
    share. To let an image out, remove its lines; a line that was cut, by a kill or a full disk, is skipped. Raises
    ValueError for a file that holds something else, OSError."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._reasons, self._strikes = path, dict[str, str](), Counter[str]()
        text = path.read_text(errors="replace") if path and path.exists() else ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._count(record["sha256"], str(record["reason"]))
            except (ValueError, TypeError, KeyError):
                if line.startswith(_BEGINNING) or _BEGINNING.startswith(line):
                    log.warning("%s, line %d was cut: skipped", path, number)
                    continue
                raise ValueError(f"{path}, line {number} is not a quarantined image: choose another file") from None

    def __len__(self) -> int:
        """Images that are not sent any more."""
        return sum(strikes >= STRIKES for strikes in self._strikes.values())

    def reason(self, encoded: bytes) -> str | None:
        """Why these bytes are not sent; None when they may be."""
        if not self._strikes:
            return None
        sha256 = _hash(encoded)
        return self._reasons[sha256] if self._strikes[sha256] >= STRIKES else None

    def strike(self, encoded: bytes, reason: str) -> None:
        """A file that cannot be written is warned of: the strike counts in memory."""
        sha256 = _hash(encoded)
        self._count(sha256, reason)
        log.warning("image %s: strike %d of %d", sha256[:16], self._strikes[sha256], STRIKES)
        if self._path is not None:
            try:
                _append(self._path, json.dumps({"sha256": sha256, "reason": reason}))
            except OSError as error:
                log.warning("the strike is not kept: %s cannot be written (%s)", self._path, error.strerror)

    def _count(self, sha256: str, reason: str) -> None:
        self._reasons[sha256] = reason
        self._strikes[sha256] += 1


def _append(path: Path, line: str) -> None:
    with path.open("ab+") as file:  # one write a line: others may append too
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            line = line if file.read() == b"\n" else "\n" + line  # not to the end of one that was cut
        file.write(line.encode() + b"\n")


def _hash(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()

"""A line in the server's log for every request that a stand-in backend refuses, with the request's id: the one that the
client sent, which its journal holds too. Never a reason: it may quote a header of the image."""

import json
import os
import re

REQUEST_ID = re.compile(r"[0-9A-Za-z._:-]{1,64}")  # others are not written: a client could write lines of the log
PREFIX = "scaphoid-request"
KEYS = ("request_id", "model", "status")
LINE = re.compile(rf'[IWE]\d{{4}} .*"{PREFIX} (\{{.*\}})"$')


def log_refused(request, status: str) -> None:
    """Write the line for a Triton request, from a backend's process."""
    import triton_python_backend_utils as pb_utils

    from scaphoid.triton_repo.supervisor.process import model_of  # a request of core 2.51 does not know its model

    pb_utils.Logger.log_warn(refused(request.request_id(), model_of(os.getpid()), status))


def refused(request_id: str, model: str, status: str) -> str:
    known = request_id if REQUEST_ID.fullmatch(request_id) else ""
    return f"{PREFIX} {json.dumps(dict(zip(KEYS, (known, model, status), strict=True)))}"


def parse(line: str) -> dict[str, str] | None:
    """What `refused` wrote, from a line of Triton's log; None for any other line."""
    if not (match := LINE.match(line)):
        return None
    try:
        event = json.loads(match[1].replace('\\"', '"'))
        return {key: event[key] for key in KEYS}
    except (ValueError, KeyError, TypeError):
        return None

"""A canary: one inference through every stage of a flow, of an image that is known to be well."""

import math

from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.supervisor.api import OK, ServerError, TritonApi, first_line

IMAGE = b"P5\n64 64\n255\n" + bytes((3 * x + 5 * y + x * y // 8) % 256 for y in range(64) for x in range(64))
REQUEST_ID = "canary"
TIMEOUT_S = 20.0
UNAVAILABLE = 503  # a full queue


class CanaryLate(ServerError):
    """A flow did not answer its canary in time: it hangs, or it is busy."""


def canary(api: TritonApi, flow: str, model: str = "") -> None:
    """Ask for every output of `flow`, which the server knows as `model` (default: the flow's name). Raises ServerError
    unless all come back finite, CanaryLate when nothing comes back in time or the queue is full."""
    outputs = FLOWS[flow].outputs
    encoded = {"name": ENCODED.name, "shape": [1, len(IMAGE)], "datatype": ENCODED.dtype, "data": list(IMAGE)}
    body = {"id": REQUEST_ID, "inputs": [encoded], "outputs": [{"name": name} for name in outputs]}
    try:
        status, answer = api.request("POST", f"/v2/models/{model or flow}/infer", body, TIMEOUT_S)
    except TimeoutError:
        raise CanaryLate(f"flow {flow} did not answer within {TIMEOUT_S:g} s") from None
    except OSError as error:
        raise ServerError(f"flow {flow} does not answer: {error}") from None
    if status != OK:
        kind = CanaryLate if status == UNAVAILABLE else ServerError
        told = first_line(answer, status).removeprefix(f"in ensemble '{flow}', ")
        raise kind(f"flow {flow} answers with an error (Triton: {told})")
    values = {output["name"]: output["data"] for output in answer["outputs"]}
    if bad := [name for name in outputs if not values.get(name) or not all(map(math.isfinite, values[name]))]:
        raise ServerError(f"flow {flow} answers without a finite {', '.join(bad)}")

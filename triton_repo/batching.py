"""What the CPU stand-ins of Triton's backends share: one run for all requests, an answer for each.

Runs inside the server's Python stubs, where `triton_python_backend_utils` exists. Needs numpy alone.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from scaphoid.triton_repo.supervisor.request_log import log_refused

Run = Callable[[list[np.ndarray]], dict[str, np.ndarray]]
NAMED_INDEX = re.compile(r".+__(\d+)$")


def answer_all(requests: Sequence, inputs: Sequence[str], run: Run) -> list:
    """A response for each Triton request. `run` takes the inputs' arrays, in order, batch first, and returns arrays by
    name.

    The server hands over requests whose tensors have equal shapes, so they run as one batch. If that fails, each runs
    alone, and only those that fail again are answered with an error: INTERNAL, for an engine that fails says nothing
    against the image.
    """
    import triton_python_backend_utils as pb_utils

    arrays = [[pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in inputs] for request in requests]
    try:
        parts = split(
            run([np.concatenate(column) for column in zip(*arrays, strict=True)]), [each[0].shape[0] for each in arrays]
        )
    except Exception as error:
        parts = [error] if len(arrays) == 1 else [_alone(run, each) for each in arrays]
    responses = []
    for request, part in zip(requests, parts, strict=True):
        if isinstance(part, Exception):
            log_refused(request, "INTERNAL")
            message = str(part).strip().splitlines()[-1] if str(part).strip() else type(part).__name__
            responses.append(
                pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
            )
        else:
            wanted = request.requested_output_names()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(name, part[name]) for name in wanted]))
    return responses


def split(results: dict[str, np.ndarray], sizes: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Each request's rows of every result, copied: an engine reuses its output memory."""
    ends = np.cumsum(sizes)
    return [
        {name: array[end - size : end].copy() for name, array in results.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _alone(run: Run, arrays: list[np.ndarray]) -> dict[str, np.ndarray] | Exception:
    try:
        return split(run(arrays), [arrays[0].shape[0]])[0]
    except Exception as error:
        return error


def input_places(names: Sequence[str], arguments: Sequence[str]) -> list[int]:
    """For each of `forward`'s arguments, the place of its tensor among the configured inputs, by the rules of Triton's
    pytorch backend: all `names` are argument names; else all are `name__index`; else the configuration's order
    holds."""
    if set(names) == set(arguments):
        return [names.index(argument) for argument in arguments]
    indices = _named_indices(names)
    return list(range(len(names))) if indices is None else [indices.index(place) for place in range(len(arguments))]


def output_places(names: Sequence[str]) -> dict[str, int]:
    """For each configured output, its place in `forward`'s tuple: `name__index`, else the configuration's order."""
    indices = _named_indices(names)
    return dict(zip(names, range(len(names)) if indices is None else indices, strict=True))


def _named_indices(names: Sequence[str]) -> list[int] | None:
    matches = [NAMED_INDEX.match(name) for name in names]
    return [int(match[1]) for match in matches] if all(matches) else None

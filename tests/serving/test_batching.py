import json
import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pytest

from scaphoid.triton_repo.batching import answer_all, input_places, output_places, split


@pytest.mark.parametrize(
    ("names", "arguments", "places"),
    [
        (["image", "activation"], ["image", "activation"], [0, 1]),
        (["activation", "image"], ["image", "activation"], [1, 0]),  # by argument name, whatever the order
        (["b__1", "a__0"], ["x", "y"], [1, 0]),  # by index
        (["left", "right"], ["x", "y"], [0, 1]),  # by order
        (["image", "other"], ["image", "activation"], [0, 1]),  # one name that fits is not enough
    ],
)
def test_inputs_bind_as_the_native_pytorch_backend_binds_them(names, arguments, places):
    assert input_places(names, arguments) == places


def test_outputs_bind_by_index_else_by_order():
    assert output_places(["box__1", "margin__0"]) == {"box__1": 1, "margin__0": 0}
    assert output_places(["margin", "box"]) == {"margin": 0, "box": 1}


def test_split_copies_each_requests_rows():
    memory = np.arange(10.0).reshape(5, 2)
    first, second = split({"y": memory}, [2, 3])
    memory[:] = -1
    assert first["y"].tolist() == [[0, 1], [2, 3]]
    assert second["y"].shape == (3, 2)


@dataclass
class Request:
    x: np.ndarray
    wanted: tuple[str, ...] = ("y",)

    def requested_output_names(self):
        return self.wanted

    def request_id(self):
        return "3f2a"


@dataclass
class Response:
    tensors: list = field(default_factory=list)
    error: object = None


class Error(Exception):
    INTERNAL = 1

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


@pytest.fixture
def triton(monkeypatch):
    logged = []
    module = types.SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(as_numpy=lambda: getattr(request, name)),
        InferenceResponse=lambda tensors=(), error=None: Response(list(tensors), error),
        Tensor=lambda name, array: (name, array),
        TritonError=Error,
        Logger=types.SimpleNamespace(log_warn=logged.append),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return logged


def test_a_bad_request_does_not_take_its_neighbours(triton):
    def run(arrays):
        if (arrays[0] < 0).any():
            raise ValueError("engine: negative pixel")
        return {"y": arrays[0] * 2, "z": arrays[0]}

    requests = [Request(np.full((1, 2), value)) for value in (1.0, -1.0, 3.0)]
    good, bad, also_good = answer_all(requests, ["x"], run)
    assert good.tensors[0][1].tolist() == [[2, 2]]
    assert also_good.tensors[0][1].tolist() == [[6, 6]]
    assert "negative pixel" in str(bad.error)
    assert bad.error.code == Error.INTERNAL  # the client tries again: the image may be sound
    (logged,) = triton
    event = json.loads(logged.removeprefix("scaphoid-request "))
    assert (event["request_id"], event["status"]) == ("3f2a", "INTERNAL")


def test_only_requested_outputs_are_sent(triton):
    (response,) = answer_all([Request(np.ones((2, 2)), ("z",))], ["x"], lambda arrays: {"y": arrays[0], "z": arrays[0]})
    assert [name for name, _ in response.tensors] == ["z"]

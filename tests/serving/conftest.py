"""A KServe v2 gRPC server in this process that answers, fails, stalls or disconnects as a test tells it to."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelParameter
from tritonclient.utils import InferenceServerException

from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import Client, Outputs
from scaphoid.triton_repo.supervisor.canary import IMAGE as CANARY

DIMS = {"box": (4,), "main_box": (4,), "window_boxes": (7, 4), "window_scores": (7,)}


def answer_for(encoded: bytes, name: str) -> np.ndarray:
    """A fixed, plausible value of output `name` for these bytes."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big"))
    if name in ("box", "main_box"):
        return np.array([4.5, 6.25, 40.0, 30.75], np.float32)
    if name == "window_boxes":
        return np.tile(np.array([2.0, 3.0, 20.0, 21.5], np.float32), (7, 1)) + np.arange(7, dtype=np.float32)[:, None]
    if name == "window_scores":
        return np.linspace(3, 1, 7, dtype=np.float32)
    if name == "margin":
        return np.array([0.01], np.float32)
    return rng.uniform(0, 1, 1).astype(np.float32)


class Refusal(Exception):
    """An error that the server answers with: a gRPC status and a message."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`behave(bytes, attempt)` may sleep or raise Refusal; `attempt` counts how often these bytes were sent, from 1."""

    behave: Callable[[bytes, int], None] = lambda encoded, attempt: None
    ready: bool = True
    versions: tuple[str, ...] = ("1",)
    weights: str = "3f2a9c1b"
    phantoms: str = ""
    accepted: str = ""
    flows: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {name: flow.outputs for name, flow in FLOWS.items()}
    )
    sent: list[bytes] = field(default_factory=list)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    asked_version: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)
    canary_fails: bool = False
    most_in_flight: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self._lock, self._in_flight = threading.Lock(), 0

    def start(self, port: int = 0) -> None:
        self.grpc = grpc.server(ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.grpc)
        self.url = f"127.0.0.1:{self.grpc.add_insecure_port(f'127.0.0.1:{port}')}"
        self.grpc.start()

    def stop(self) -> None:
        self.grpc.stop(grace=0)

    def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelMetadata(self, request, context):
        if request.name not in self.flows:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        outputs = [
            service_pb2.ModelMetadataResponse.TensorMetadata(name=name, datatype="FP32")
            for name in self.flows[request.name]
        ]
        return service_pb2.ModelMetadataResponse(name=request.name, versions=self.versions, outputs=outputs)

    def ModelConfig(self, request, context):
        values = {"weights": self.weights, "trained_on_phantoms": self.phantoms, "accepted": self.accepted}
        parameters = {name: ModelParameter(string_value=value) for name, value in values.items() if value}
        return service_pb2.ModelConfigResponse(config=ModelConfig(name=request.name, parameters=parameters))

    def ModelInfer(self, request, context):
        encoded = request.raw_input_contents[0]
        names = tuple(output.name for output in request.outputs)
        version = request.model_version or max(self.versions, key=int)
        if encoded == CANARY:
            if self.canary_fails:
                context.abort(grpc.StatusCode.INTERNAL, "no flow answers")
            return answer(request, version, names)
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            self.sent.append(encoded)
            self.asked.append(names)
            self.asked_version.append(request.model_version)
            self.ids.append(request.id)
            self.alone.append(self._in_flight == 1)
            attempt = self.sent.count(encoded)
        try:
            assert list(request.inputs[0].shape) == [1, len(encoded)]
            self.behave(encoded, attempt)
        except Refusal as refusal:
            context.abort(refusal.status, refusal.message)
        finally:
            with self._lock:
                self._in_flight -= 1
        return answer(request, version, names)


def answer(request: service_pb2.ModelInferRequest, version: str, names: tuple[str, ...]):
    response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
    for name in names:
        value = answer_for(request.raw_input_contents[0], name)
        response.outputs.add(name=name, datatype="FP32", shape=[1, *value.shape])
        response.raw_output_contents.append(value.tobytes())
    return response


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def ask() -> Callable[..., Outputs]:
    """ask(server, encoded=..., flow="msfm", **settings): what a client with these settings is answered."""

    def infer(server: FakeServer, encoded: bytes = b"bytes of an image", flow: str = "msfm", **settings) -> Outputs:
        with Client(server.url, flow, **settings) as client:
            return client.infer(encoded)

    return infer


@pytest.fixture
def pixels() -> Callable[[int], np.ndarray]:
    """pixels(seed): uint8 [47, 61]."""
    return lambda seed: np.random.default_rng(seed).integers(0, 256, (47, 61), dtype=np.uint8)


@pytest.fixture
def radiographs(tmp_path):
    """A MURA-like folder: three studies of two different images each, 53 x 61 pixels. Returns its root."""
    rng = np.random.default_rng(7)
    root = tmp_path / "mura"
    for patient, study in (
        ("patient00001", "study1_positive"),
        ("patient00002", "study1_negative"),
        ("patient00002", "study2_negative"),
    ):
        folder = root / "XR_WRIST" / patient / study
        folder.mkdir(parents=True)
        for number in (1, 2):
            pixels = np.kron(rng.integers(0, 255, (61 // 8 + 1, 53 // 8 + 1)), np.ones((8, 8)))[:61, :53].astype(
                np.uint8
            )
            Image.fromarray(pixels).save(folder / f"image{number}.png")
    return root


@pytest.fixture
def slow() -> Callable[[float], Callable[[bytes, int], None]]:
    """slow(seconds): a behaviour that answers late."""
    return lambda seconds: lambda encoded, attempt: time.sleep(seconds)


@pytest.fixture
def refusal() -> Callable[..., Callable[[bytes, int], None]]:
    """refusal(status, message, of=None, attempts=99): a behaviour that refuses the bytes `of` (all) that many times."""

    def make(status: grpc.StatusCode, message: str, of: bytes | None = None, attempts: int = 99):
        def behave(encoded: bytes, attempt: int) -> None:
            if (of is None or encoded == of) and attempt <= attempts:
                raise Refusal(status, message)

        return behave

    return make


@pytest.fixture(scope="session")
def tiny_kalm(tmp_path_factory) -> list[Path]:
    """Artefacts of two tiny untrained KALM models, which differ in their weights alone."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("scaphoid.kernels.library")
    from scaphoid.export.export import export
    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig

    folder, threads = tmp_path_factory.mktemp("tiny_kalm"), torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in (7, 8):
        torch.manual_seed(seed)
        weights = folder / f"{seed}.safetensors"
        save_model(weights, Kalm(KalmConfig("test_resnet", image_size=224, key_size=112)))
        export([weights], folder / f"artefacts{seed}", images=2)
    torch.set_num_threads(threads)
    return [folder / "artefacts7", folder / "artefacts8"]


@dataclass
class Load:
    """Requests that four threads send to a real server, one after the other, with the bytes `encoded`. `answers` are
    (when sent, seconds, model version, probability), `failures` (when sent, seconds, message)."""

    url: str
    flow: str
    encoded: bytes
    deadline_s: float = 60.0
    answers: list[tuple[float, float, str, float]] = field(default_factory=list)
    failures: list[tuple[float, float, str]] = field(default_factory=list)
    threads: int = 4

    def __enter__(self) -> "Load":
        self._stop = threading.Event()
        self._pool = [threading.Thread(target=self._run) for _ in range(self.threads)]
        for thread in self._pool:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._pool:
            thread.join(self.deadline_s + 30)
        assert not any(thread.is_alive() for thread in self._pool)

    def _run(self) -> None:
        given = tritonclient.grpc.InferInput("encoded", [1, len(self.encoded)], "UINT8")
        given.set_data_from_numpy(np.frombuffer(self.encoded, np.uint8)[None])
        wanted = [tritonclient.grpc.InferRequestedOutput("probability")]
        with tritonclient.grpc.InferenceServerClient(self.url) as client:
            while not self._stop.is_set():
                sent = time.monotonic()
                try:
                    result = client.infer(self.flow, [given], outputs=wanted, client_timeout=self.deadline_s)
                except InferenceServerException as error:
                    self.failures.append((sent, time.monotonic() - sent, str(error)))
                    time.sleep(0.05)
                else:
                    probability = float(result.as_numpy("probability").item())
                    version = result.get_response().model_version
                    self.answers.append((sent, time.monotonic() - sent, version, probability))
                    time.sleep(0.02)  # the machine has other work: starting what was killed


@pytest.fixture(scope="session")
def load() -> type[Load]:
    return Load

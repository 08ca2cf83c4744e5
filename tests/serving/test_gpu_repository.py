"""The GPU repository in the real server core, without a GPU.

Backends that need one have stand-ins (stand_ins/): `tensorrt` runs the ONNX from which an engine would be built, `dali`
the CPU twin of the GPU's pipeline. Everything else is what is shipped, byte for byte, and the guard runs in the Python
backend that it is shipped for. What the core, the answers and the manifests find wrong is found here by mistakes that
are made on purpose.
"""

import asyncio
import contextlib
import functools
import io
import os
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import InferenceServerException

from scaphoid.export.artefacts import verify
from scaphoid.export.tensorrt_engines.build_engines import build_all, make_jobs
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.data.guard import RejectedImage, check_encoded
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import Engines, assemble
from scaphoid.triton_repo.configs import CONFIG, read
from scaphoid.triton_repo.requests.async_client import AsyncClient
from scaphoid.triton_repo.requests.failures import ClientError
from scaphoid.triton_repo.rules import BATCH, INTERACTIVE
from scaphoid.triton_repo.supervisor.api import ServerError, TritonApi
from scaphoid.triton_repo.supervisor.canary import canary
from scaphoid.triton_repo.supervisor.installation import from_wheel
from scaphoid.triton_repo.supervisor.ports import free_ports
from scaphoid.triton_repo.supervisor.process import TritonProcess

pytestmark = pytest.mark.slow
STAND_INS = Path(__file__).parent / "stand_ins"
TENSORRT = SimpleNamespace(__name__="tensorrt", __version__="10.13.0")
GPU = "a GPU, compute capability 9.0"
START_TIMEOUT_S = 150.0  # 20 s on an idle machine
PIXEL, PROBABILITY = 1.0, 1e-4  # what two engines in fp32 may differ by
BOXES = ("box", "main_box", "window_boxes")
Answers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Iterator[Path]:
    torch = pytest.importorskip("torch")
    for name in ("onnx", "onnxruntime", "scaphoid.kernels.library"):
        pytest.importorskip(name)
    from scaphoid.export.export import export
    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig
    from scaphoid.trainer.models.msfm import Msfm, MsfmConfig

    folder = tmp_path_factory.mktemp("gpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    save_model(folder / "msfm.safetensors", Msfm(MsfmConfig("test_resnet", image_size=160, part_size=96)))
    save_model(folder / "kalm.safetensors", Kalm(KalmConfig("test_resnet", image_size=160, key_size=96)))
    weights = [folder / "msfm.safetensors", folder / "kalm.safetensors"]
    export(weights, folder / "artefacts", formats=["onnx"], images=1)
    yield folder / "artefacts"
    torch.set_num_threads(threads)


def engines(artefacts: Path, folder: Path, write: Callable) -> Engines:
    """A folder of engines with the manifest that building them leaves; `write(job, plan)` writes each."""
    jobs = make_jobs(artefacts, "f32", TENSORRT, GPU)
    assert build_all(jobs, folder, lambda job, workspace, plan, timing_cache: write(job, plan))
    return Engines(folder, TENSORRT, GPU, "f32")


@pytest.fixture(scope="module")
def repository(artefacts) -> Path:
    twins = engines(artefacts, artefacts.with_name("twins"), lambda job, plan: shutil.copyfile(job.onnx, plan))
    assemble(artefacts, artefacts.with_name("gpu"), twins)
    return artefacts.with_name("gpu")


@dataclass
class Server:
    """`refused` are what the backends say of every request that they refuse."""

    api: TritonApi
    url: str
    refused: list[dict] = field(default_factory=list)

    def ask(self, flow: str, encoded: bytes, priority: int = 0) -> Answers:
        with tritonclient.grpc.InferenceServerClient(self.url) as client:
            result = client.infer(flow, inputs(encoded), priority=priority)
        return {name: result.as_numpy(name) for name in FLOWS[flow].outputs}

    def ask_at_once(self, flow: str, files: Sequence[bytes]) -> list[Answers | InferenceServerException]:
        """Each file's answer, or why there is none, to requests of which nothing is sent twice. A request's id is its
        place."""
        answers, done = [None] * len(files), threading.Semaphore(0)
        with tritonclient.grpc.InferenceServerClient(self.url) as client:

            def keep(place: int, result, error) -> None:
                answers[place] = error or {name: result.as_numpy(name) for name in FLOWS[flow].outputs}
                done.release()

            for place, file in enumerate(files):
                given = inputs(file)
                client.async_infer(flow, given, callback=functools.partial(keep, place), request_id=f"place-{place}")
            assert all(done.acquire(timeout=60) for _ in files)
        return answers


def inputs(encoded: bytes) -> list:
    given = tritonclient.grpc.InferInput("encoded", [1, len(encoded)], "UINT8")
    given.set_data_from_numpy(np.frombuffer(encoded, np.uint8)[None])
    return [given]


@contextlib.contextmanager
def serving(repository: Path, folder: Path, stand_ins: Path | None = None) -> Iterator[Server]:
    """The wheel's server on `repository`; a backend in `stand_ins` takes the place of the package's."""
    found = from_wheel(folder)
    if stand_ins:
        shutil.copytree(stand_ins, folder / "backends", dirs_exist_ok=True)
    http, grpc, metrics = free_ports("127.0.0.1")
    prefix = f"scaphoid-gpu-test-{os.getpid()}-"
    options = [
        *("--model-control-mode=explicit", *(f"--load-model={flow}" for flow in FLOWS)),
        *("--disable-auto-complete-config", "--exit-timeout-secs=2"),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"),
        *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]
    command = [str(found.binary), *found.options, f"--model-repository={repository}", *options]
    environment = {**found.environment, "OMP_NUM_THREADS": "1"}
    server = Server(TritonApi("127.0.0.1", http), f"127.0.0.1:{grpc}")
    process, api = TritonProcess(command, environment, prefix, server.refused.append), server.api
    try:
        process.launch()
        deadline, waiting = time.monotonic() + START_TIMEOUT_S, list(FLOWS)
        while waiting:
            assert process.exit_code is None, process.errors
            assert time.monotonic() < deadline, process.errors
            with contextlib.suppress(OSError):
                if api.is_ready(waiting[0]):
                    canary(api, waiting.pop(0))
                    continue
            time.sleep(0.2)
        yield server
    finally:
        process.end()


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """PNG, JPEG and PGM in several sizes."""
    from scaphoid.export.gate_images import gate_images

    drawn = [Image.open(io.BytesIO(encoded)) for encoded in gate_images(3).encoded]
    files = [io.BytesIO() for _ in drawn]
    drawn[0].save(files[0], "png")
    drawn[1].resize((431, 517)).save(files[1], "jpeg", quality=95)
    drawn[2].resize((233, 301)).save(files[2], "ppm")
    return [file.getvalue() for file in files]


@pytest.fixture(scope="module")
def cpu_answers(artefacts, images, tmp_path_factory) -> dict[str, list[Answers]]:
    assemble(artefacts, artefacts.with_name("cpu"))
    with serving(artefacts.with_name("cpu"), tmp_path_factory.mktemp("wheel")) as server:
        return {flow: [server.ask(flow, image) for image in images] for flow in FLOWS}


@pytest.fixture(scope="module")
def server(repository, cpu_answers, tmp_path_factory) -> Iterator[Server]:
    with serving(repository, tmp_path_factory.mktemp("stand_ins"), STAND_INS) as server:
        yield server
    verify(repository)  # nothing was written there


def differences(found: Answers, expected: Answers) -> list[str]:
    """Outputs that differ by more than two engines may."""
    limits = {name: PIXEL if name in BOXES else PROBABILITY for name in expected}
    return [
        name
        for name, value in expected.items()
        if found[name].shape != value.shape or not np.allclose(found[name], value, rtol=1e-4, atol=limits[name])
    ]


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_gpu_ensembles_answer_as_the_cpu_ensembles_do(server, cpu_answers, images, flow):
    for image, expected in zip(images, cpu_answers[flow], strict=True):
        assert differences(server.ask(flow, image), expected) == []


def test_what_is_loaded_is_what_is_shipped(artefacts, repository, server):
    """Assembled from engines in place of their twins, every other file has the same bytes."""
    built = engines(artefacts, artefacts.with_name("built"), lambda job, plan: plan.write_text(f"engine {job.stage}"))
    assemble(artefacts, artefacts.with_name("shipped"), built)
    shipped, loaded = (verify(artefacts.with_name(name))["files"] for name in ("shipped", "gpu"))
    assert shipped.keys() == loaded.keys()
    differing = {name for name in shipped if shipped[name] != loaded[name]}
    assert differing == {name for name in shipped if name.endswith("/1/model.plan")}
    for name in (path.parent.name for path in repository.glob(f"*/{CONFIG}")):
        served = server.api.request("GET", f"/v2/models/{name}/config")[1]
        written = read(repository / name / CONFIG)
        for kind in ("input", "output"):
            dims = [[int(dim) for dim in tensor["dims"]] for tensor in served[kind]]
            assert dims == [list(tensor.dims) for tensor in getattr(written, kind)]
        assert served["backend"] == written.backend or name in FLOWS


def test_the_pipeline_leaves_images_on_the_gpu_and_sizes_on_the_host(repository):
    """Read in the file itself: DALI's protobuf names an output and, next to it, its device."""
    serialized = (repository / "preprocess" / "1" / "model.dali").read_bytes()
    assert re.findall(rb"__(Reshape|Cast)_\d+\x12\x03(cpu|gpu)\x18\x00\(", serialized) == [
        (b"Reshape", b"gpu"),
        (b"Cast", b"cpu"),
    ]


def test_glue_names_no_device(repository):
    """The backend moves a model to its GPU; a device that is written in it would stay."""
    import torch

    glue = sorted(repository.glob("*/1/model.pt"))
    assert len(glue) == sum(stage.kind == "glue" for stage in STAGES.values())
    for path in glue:
        graph = str(torch.jit.load(str(path)).inlined_graph)
        assert not re.search(r'"(cpu|cuda)', graph), path


def test_requests_of_different_lengths_batch(server, images, cpu_answers):
    before = executions(server, "preprocess")
    answers = server.ask_at_once("kalm", images * 8)
    for place, found in enumerate(answers):
        assert differences(found, cpu_answers["kalm"][place % len(images)]) == []
    assert executions(server, "preprocess") - before < len(answers)


def bad_images(png: bytes) -> dict[str, bytes]:
    """What the guard refuses, each in another way."""
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    return {
        "cut": png[:-40],
        "a flipped bit": bytes(flipped),
        "zero bytes": bytes(500),
        "text": b"a radiograph, honestly",
        "DICOM": bytes(128) + b"DICM" + bytes(100),
        "bomb": b"P5\n99999 99999\n255\n" + bytes(100),
    }


def test_a_bad_image_fails_alone_and_those_beside_it_are_answered_at_once(server, images, cpu_answers):
    """In one batch of DALI's they would fail together, and nothing is sent a second time here."""
    bad = bad_images(images[0])
    files = [file for each in bad.values() for file in (*images, each)] + images
    places = [place for place, file in enumerate(files) if file in bad.values()]
    before, server.refused[:] = executions(server, "preprocess"), []
    answers = server.ask_at_once("kalm", files)
    for place, name in zip(places, bad, strict=True):
        with pytest.raises(RejectedImage) as rejected:
            check_encoded(bad[name])
        answer = answers[place]
        assert isinstance(answer, InferenceServerException), name
        assert str(answer.status()) == "StatusCode.INVALID_ARGUMENT"
        assert rejected.value.reason in answer.message()
    good = [answer for place, answer in enumerate(answers) if place not in places]
    for place, found in enumerate(good):
        assert differences(found, cpu_answers["kalm"][place % len(images)]) == []
    assert executions(server, "preprocess") - before < len(good), "they did not batch: nothing was tried"
    events = [{"request_id": f"place-{place}", "model": "guard", "status": "INVALID_ARGUMENT"} for place in places]
    deadline = time.monotonic() + 5
    while len(server.refused) < len(events) and time.monotonic() < deadline:
        time.sleep(0.05)  # the log is read by a thread
    assert sorted(server.refused, key=str) == sorted(events, key=str)


def test_the_guard_is_asked_by_every_ensemble(server, images):
    for flow in FLOWS:
        with pytest.raises(InferenceServerException, match="truncated: the PNG file"):
            server.ask(flow, images[0][:-40])


def slow_to_guard() -> bytes:
    """A PNG whose alpha channel the guard has to look through: tens of milliseconds."""
    pixels = np.full((1601, 1599, 4), 255, np.uint8)
    pixels[..., :3] = (np.add.outer(np.arange(1601), np.arange(1599)) % 256)[..., None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def test_a_full_queue_rejects_and_loses_no_request_that_it_took(server):
    image = slow_to_guard()
    expected = server.ask("kalm", image)
    answers = server.ask_at_once("kalm", [image] * 160)  # the queue of one priority takes 32
    refused = [answer for answer in answers if isinstance(answer, InferenceServerException)]
    assert {str(answer.status()) for answer in refused} == {"StatusCode.UNAVAILABLE"}
    assert len(answers) - len(refused) >= 32
    for found in answers:
        if not isinstance(found, InferenceServerException):
            assert differences(found, expected) == []


def executions(server: Server, model: str) -> int:
    return server.api.statistics(model)[0]["execution_count"]


def test_who_waits_goes_before_who_does_not(server, images):
    order, done = [], threading.Semaphore(0)
    with tritonclient.grpc.InferenceServerClient(server.url) as client:

        def keep(name, error):
            order.append(f"{name} refused: {error}" if error else name)
            done.release()

        for priority, name in [*[(BATCH, "archive")] * 30, (INTERACTIVE, "person")]:
            client.async_infer(
                "msfm_fma",
                inputs(images[0]),
                priority=priority,
                callback=lambda result, error, name=name: keep(name, error),
            )
        assert all(done.acquire(timeout=30) for _ in range(31))
    assert set(order) == {"archive", "person"}
    assert order.index("person") < 25, "the last to come was not served before those that had come before"


def test_dali_fails_a_batch_as_a_whole_and_is_well_again(server, images):
    good = np.frombuffer(images[0], np.uint8)
    bad = np.zeros_like(good)
    with tritonclient.grpc.InferenceServerClient(server.url) as client:

        def decode(*rows: np.ndarray) -> np.ndarray:
            given = tritonclient.grpc.InferInput("encoded", [len(rows), len(good)], "UINT8")
            given.set_data_from_numpy(np.stack(rows))
            return client.infer("preprocess", [given]).as_numpy("image")

        with pytest.raises(InferenceServerException, match="cannot be decoded") as error:
            decode(good, bad, good)
        assert "UNKNOWN" in str(error.value.status())  # to a client: not this image's fault as far as is known
        assert np.array_equal(*decode(good, good))


def with_broken_pixels(png: bytes) -> bytes:
    """Sound by its header, chunks and checksums, so that the guard lets it through; no decoder inflates it."""
    start = png.index(b"IDAT") + 4
    (size,) = struct.unpack(">I", png[start - 8 : start - 4])
    pixels = png[start : start + 2] + bytes(size - 2)
    checked = png[:start] + pixels + struct.pack(">I", zlib.crc32(b"IDAT" + pixels)) + png[start + size + 4 :]
    check_encoded(checked)
    return checked


def test_a_client_gets_every_good_answer_of_a_batch_that_failed(server, images, cpu_answers):
    broken, good = with_broken_pixels(images[0]), [images[place % len(images)] for place in range(12)]

    async def send() -> list:
        async with AsyncClient(server.url, "kalm", in_flight=16) as client:
            return await asyncio.gather(*map(client.infer, [*good[:6], broken, *good[6:]]), return_exceptions=True)

    answers = asyncio.run(send())
    failure = answers.pop(6)
    assert isinstance(failure, ClientError)
    assert "cannot be decoded" in str(failure)
    for place, answer in enumerate(answers):
        found = {name: value[None] for name, value in answer.tensors.items()}
        assert differences(found, cpu_answers["kalm"][place % len(images)]) == []


def test_what_the_guard_cannot_see_takes_those_decoded_with_it_along(server, images):
    """The limit that is left: only a decoder finds these pixels broken. A client's second try saves the others."""
    broken = with_broken_pixels(images[0])
    for _ in range(8):  # until one was in a batch with others
        answers = server.ask_at_once("kalm", [*images, *images, broken, *images, *images])
        failed = [place for place, answer in enumerate(answers) if isinstance(answer, InferenceServerException)]
        assert 6 in failed
        assert all("cannot be decoded" in answers[place].message() for place in failed)
        if len(failed) > 1:
            return
    pytest.fail("it never met others in a batch")


@dataclass(frozen=True)
class Mistake:
    """A change to `model`'s configuration, and what finds it when `flow` is served: `load`, the core or a backend
    refuses to; `request`, no answer comes; `answer`, it differs from the CPU's. `told` is part of what they say."""

    model: str
    make: Callable[[ModelConfig], object]
    flow: str
    found_by: str
    told: str


def tensor(config: ModelConfig, name: str):
    return next(each for each in (*config.input, *config.output) if each.name == name)


def retype(name: str, dtype: str) -> Callable[[ModelConfig], None]:
    return lambda config: setattr(tensor(config, name), "data_type", DataType.Value(dtype))


def resize(name: str, dims: list[int]) -> Callable[[ModelConfig], None]:
    return lambda config: tensor(config, name).ClearField("dims") or tensor(config, name).dims.extend(dims)


def reverse_outputs(config: ModelConfig) -> None:
    outputs = [*config.output][::-1]
    del config.output[:]
    config.output.extend(outputs)


def swap_names(first: str, second: str) -> Callable[[ModelConfig], None]:
    def make(config: ModelConfig) -> None:
        a, b = tensor(config, first), tensor(config, second)
        a.name, b.name = b.name, a.name

    return make


def wire(written: str, side: str, **wires: str) -> Callable[[ModelConfig], None]:
    """Other wires for the `input_map` or `output_map` of the step that writes a tensor."""

    def make(config: ModelConfig) -> None:
        (step,) = (each for each in config.ensemble_scheduling.step if written in each.output_map.values())
        names = getattr(step, side)
        names.clear()
        names.update(wires)

    return make


MISTAKES = {
    "wrong dtype of an answer": Mistake("kalm", retype("box", "TYPE_FP16"), "kalm", "load", "box"),
    "wrong dtype of a stage": Mistake("suppress", retype("activation", "TYPE_FP16"), "msfm_fma", "load", "activation"),
    "wrong dtype of an engine": Mistake("local_encoder", retype("key_image", "TYPE_FP32"), "kalm", "load", "key_image"),
    "missing tensor of a step": Mistake(
        "msfm",
        wire("object_margin", "output_map", object_box="object_box", object_image="object_image"),
        "msfm",
        "load",
        "poll",  # the core says which tensor in its log alone
    ),
    "missing tensor of a stage": Mistake("main_result", lambda config: config.input.pop(), "msfm", "load", "input"),
    "missing tensor of an engine": Mistake("encoder", lambda config: config.output.pop(), "msfm", "load", "class_act"),
    "wrong dims of an answer": Mistake("msfm", resize("window_boxes", [7, 5]), "msfm", "load", "window_boxes"),
    "wrong dims of a stage": Mistake("part_crops", resize("object_image", [1, 159, 160]), "msfm", "load", "object_im"),
    "wrong dims of an engine": Mistake("global_encoder", resize("image", [1, 161, 160]), "kalm", "load", "image"),
    "swapped maps of the object": Mistake(
        "msfm",
        wire("object_logits", "output_map", logits="object_logits", class_activation="object_activation"),
        "msfm",
        "answer",
        "window_scores",
    ),
    "swapped maps of KALM": Mistake(
        "kalm",
        wire("global_logits", "output_map", logits="global_logits", class_activation="global_activation"),
        "kalm",
        "answer",
        "box",
    ),
    "another image": Mistake(
        "msfm_fma", wire("main_logits", "input_map", image="image"), "msfm_fma", "answer", "probability"
    ),
    "no guard": Mistake("kalm", lambda config: config.ensemble_scheduling.step.pop(0), "kalm", "load", "poll"),
    "past the guard": Mistake("kalm", wire("original_size", "input_map", encoded="encoded"), "kalm", "load", "poll"),
    "wrong dtype of the guard": Mistake(
        "guard", lambda config: setattr(config.output[0], "data_type", DataType.TYPE_INT8), "kalm", "load", "guarded"
    ),
    "wrong dims of the guard": Mistake(
        "guard", lambda config: config.output[0].dims.append(-1), "kalm", "load", "guarded"
    ),
    "a guard without its output": Mistake("guard", lambda config: config.output.pop(), "kalm", "load", "output"),
    "permuted outputs of one shape": Mistake("result", swap_names("box", "main_box"), "msfm", "answer", "box"),
    "permuted outputs": Mistake("key_area_crop", reverse_outputs, "kalm", "request", "key_"),
    "permuted outputs of preprocess": Mistake("preprocess", reverse_outputs, "kalm", "request", "image"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(server, repository, cpu_answers, images, name):
    mistake = MISTAKES[name]
    config = read(repository / mistake.model / CONFIG)
    mistake.make(config)
    try:
        found_by, told = find(server, mistake, config, images, cpu_answers)
    finally:
        for model in dict.fromkeys([mistake.model, mistake.flow]):
            server.api.load(model, read(repository / model / CONFIG))
    assert found_by == mistake.found_by, told
    assert mistake.told in told


def find(server: Server, mistake: Mistake, config: ModelConfig, images, cpu_answers) -> tuple[str, str]:
    """What finds a mistake, and its words."""
    try:
        server.api.load(mistake.model, config)
        if mistake.model != mistake.flow:
            server.api.load(mistake.flow)
    except ServerError as error:
        return "load", str(error)
    try:
        answers = [server.ask(mistake.flow, image) for image in images]
    except InferenceServerException as error:
        return "request", str(error)
    both = zip(answers, cpu_answers[mistake.flow], strict=True)
    differing = sorted({name for each in both for name in differences(*each)})
    return ("answer", ", ".join(differing)) if differing else ("nothing", "")


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_the_shipped_files_answer_again_after_the_mistakes(server, cpu_answers, images, flow):
    """None of them was found by what another had left behind."""
    assert differences(server.ask(flow, images[0]), cpu_answers[flow][0]) == []

"""The real Triton server, over HTTP and gRPC. The slow tests share one server on tiny untrained models."""

import io
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from scaphoid.export.artefacts import verify
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import assemble
from scaphoid.triton_repo.client import Client
from scaphoid.triton_repo.configs import CONFIG
from scaphoid.triton_repo.keys import KEY_HEADER
from scaphoid.triton_repo.supervisor.ports import free_ports
from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY, children, model_of
from scaphoid.triton_repo.supervisor.server import running_server
from scaphoid.triton_repo.versioning.versions import weights_hash

slow = pytest.mark.slow
CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
GUARD = runpy.run_path(str(Path(__file__).parents[1] / "data" / "test_guard.py"))
GOOD, BAD = GUARD["GOOD"], GUARD["BAD"]  # every kind of file: bytes, and bytes with the reason why they are refused


def png(seed: int, width: int = 231, height: int = 187) -> bytes:
    """A blurry random radiograph; every seed another picture and size."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (11, 13), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width + 7 * seed, height + 5 * seed), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def blank() -> bytes:
    file = io.BytesIO()
    Image.new("L", (90, 70), 128).save(file, "jpeg")
    return file.getvalue()


def cut_jpeg() -> bytes:
    """Half of a file's pixels, closed with an end marker."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png(5))).save(file, "jpeg", quality=95)
    return file.getvalue()[: file.tell() // 2].rstrip(b"\xff") + b"\xff\xd9"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Path:
    torch = pytest.importorskip("torch")
    pytest.importorskip("scaphoid.kernels.library")
    from scaphoid.export.export import export
    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig
    from scaphoid.trainer.models.msfm import Msfm, MsfmConfig

    folder = tmp_path_factory.mktemp("server")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    save_model(folder / "msfm.safetensors", Msfm(MsfmConfig("test_resnet", image_size=224, part_size=112)))
    save_model(folder / "kalm.safetensors", Kalm(KalmConfig("test_resnet", image_size=224, key_size=112)))
    export([folder / "msfm.safetensors", folder / "kalm.safetensors"], folder / "artefacts", images=2)
    yield folder / "artefacts"
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def repository(artefacts) -> Path:
    assemble(artefacts, artefacts.with_name("repository"))
    return artefacts.with_name("repository")


@pytest.fixture(scope="module")
def server(repository):
    with running_server(repository) as server:
        pid = server.pid
        yield server
    assert not Path(f"/proc/{pid}").exists()
    assert not list(SHARED_MEMORY.glob(f"{server._prefix}*"))


@pytest.fixture(scope="module")
def runner(artefacts):
    from scaphoid.export.runner import Runner

    runners = {flow: Runner(artefacts, flow, threads=1) for flow in FLOWS}
    return lambda flow, encoded, wanted=None: runners[flow]([encoded], wanted)


def ask(server, flow: str, encoded: bytes, wanted=None, protocol: str = "grpc") -> dict[str, np.ndarray]:
    triton = CLIENTS[protocol]
    names = FLOWS[flow].outputs if wanted is None else wanted
    given = triton.InferInput("encoded", [1, len(encoded)], "UINT8")
    given.set_data_from_numpy(np.frombuffer(encoded, np.uint8)[None])
    wanted = [triton.InferRequestedOutput(name) for name in names]
    headers = {KEY_HEADER: server.api.local_key}  # HTTP inference is for the server's own user
    with triton.InferenceServerClient(server.grpc_url if protocol == "grpc" else server.http_url) as client:
        result = client.infer(flow, [given], outputs=wanted, headers=headers)
    return {name: result.as_numpy(name) for name in names}


def executions(server) -> dict[str, int]:
    """How many inferences each model has run."""
    with tritonclient.http.InferenceServerClient(server.http_url) as client:
        return {
            m["name"]: m["inference_stats"]["success"]["count"]
            for m in client.get_inference_statistics()["model_stats"]
        }


def backend_processes(server) -> dict[str, int]:
    """Process id of the backend process of every model."""
    return {model_of(pid): pid for pid in children(server.pid)}


@slow
@pytest.mark.parametrize("protocol", sorted(CLIENTS))
@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_server_answers_what_the_flow_computes_in_process(server, runner, flow, protocol):
    encoded = png(3)
    served, expected = ask(server, flow, encoded, protocol=protocol), runner(flow, encoded)
    for name in FLOWS[flow].outputs:
        assert served[name].dtype == np.float32
        np.testing.assert_allclose(served[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@slow
def test_engines_agree_with_eager(server, artefacts):
    from scaphoid.export.flow_parity import Parity, answers
    from scaphoid.export.runner import eager_stages, load_served

    encoded = [png(seed) for seed in range(4)]
    for name, weights in (("msfm", "msfm"), ("msfm_fma", "msfm"), ("kalm", "kalm")):
        model = load_served(artefacts.with_name(f"{weights}.safetensors"))
        expected = answers(FLOWS[name], eager_stages(model, model.config.image_size), encoded)
        rows = [ask(server, name, each) for each in encoded]
        found = {output: np.concatenate([row[output] for row in rows]) for output in FLOWS[name].outputs}
        assert not Parity(FLOWS[name], "Triton", "f32", expected, found, map_error=1e-4).failures


@slow
def test_the_version_names_the_weights(server, repository):
    with Client(server.grpc_url, "kalm") as client:
        assert client.version == f"1@{weights_hash(verify(repository))}"


@slow
def test_steps_that_nobody_asked_for_do_not_run(server):
    before = executions(server)
    ask(server, "msfm", png(1), [name for name in FLOWS["msfm"].outputs if "parts" not in name])
    without_parts = executions(server)
    assert without_parts["encoder"] == before["encoder"] + 2
    assert without_parts["parts_encoder"] == before["parts_encoder"]
    ask(server, "msfm", png(1), ["main_probability"])
    triage = executions(server)
    assert triage["encoder"] == without_parts["encoder"] + 1
    assert triage["object_crop"] == without_parts["object_crop"]
    ask(server, "msfm", png(1), ["probability_with_parts"])
    assert executions(server)["parts_encoder"] == triage["parts_encoder"] + 1


@slow
def test_bad_inputs_mixed_with_good_ones(server, runner):
    good = [(encoded, runner("msfm", encoded, ["probability", "box"])) for encoded in GOOD.values()]
    small = [each for each in BAD.values() if len(each[0]) < 2**20]  # Triton keeps buffers of the largest requests
    bad = [*small, (blank(), "blank radiograph"), (cut_jpeg(), "pixels end early")]

    def one(index: int) -> None:
        if index % 2:
            encoded, reason = bad[index // 2 % len(bad)]
            with pytest.raises(InferenceServerException, match=reason):
                ask(server, "msfm", encoded, ["probability"])
        else:
            encoded, expected = good[index // 2 % len(good)]
            answer = ask(server, "msfm", encoded, ["probability", "box"])
            np.testing.assert_allclose(answer["box"], expected["box"], rtol=1e-4, atol=1e-3)

    def memory() -> int:
        return sum(
            int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
            for pid in [server.pid, *backend_processes(server).values()]
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))
        before = memory()
        list(pool.map(one, range(200, 1000)))
    assert memory() - before < 48 * 1024  # kB


@slow
def test_concurrent_clients_get_their_own_answers(server, runner):
    expected = [runner("msfm", png(seed), ["probability", "window_boxes"]) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            answers = pool.map(lambda seed: ask(server, "msfm", png(seed), ["probability", "window_boxes"]), range(8))
            for answer, wanted in zip(answers, expected, strict=True):
                for name, value in wanted.items():
                    np.testing.assert_allclose(answer[name], value, rtol=1e-4, atol=1e-3)


@slow
def test_a_tensor_of_another_size_is_refused(server):
    image = tritonclient.grpc.InferInput("image", [1, 1, 100, 224], "UINT8")
    image.set_data_from_numpy(np.zeros((1, 1, 100, 224), np.uint8))
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="unexpected shape"),
    ):
        client.infer("encoder", [image])


@slow
def test_model_control_needs_the_key(server):
    with tritonclient.http.InferenceServerClient(server.http_url) as client, pytest.raises(InferenceServerException):
        client.unload_model("encoder")
    with (
        tritonclient.http.InferenceServerClient(server.http_url) as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        client.infer("encoder", [])
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client, pytest.raises(InferenceServerException):
        client.unload_model("encoder")
    server.canary("msfm")


@slow
def test_permuted_outputs_are_served_permuted(server, repository):
    """Triton binds a TorchScript's outputs by the configuration's order, so a permuted file shows in the answers."""
    twin = repository / "parts_result_permuted"
    shutil.copytree(repository / "parts_result", twin)
    try:
        text = (twin / CONFIG).read_text().replace('name: "parts_result"', 'name: "parts_result_permuted"')
        first, second = '"parts_probability"', '"probability_with_parts"'
        (twin / CONFIG).write_text(text.replace(first, '"?"').replace(second, first).replace('"?"', second))
        control = "/v2/repository/models/parts_result_permuted"
        assert server.api.request("POST", f"{control}/load", {}, timeout=120)[0] == 200
        names = ("main_logits", "object_logits", "parts_logits")
        arrays = [np.array([[1, 2]], np.float32), np.array([[2, 0]], np.float32), np.eye(7, 2, dtype=np.float32)[None]]
        inputs = [tritonclient.grpc.InferInput(n, a.shape, "FP32") for n, a in zip(names, arrays, strict=True)]
        for given, array in zip(inputs, arrays, strict=True):
            given.set_data_from_numpy(array)
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
            right, wrong = (client.infer(name, inputs) for name in ("parts_result", "parts_result_permuted"))
        assert right.as_numpy("parts_probability") == wrong.as_numpy("probability_with_parts")
        assert right.as_numpy("parts_probability") != wrong.as_numpy("parts_probability")
        assert server.api.request("POST", f"{control}/unload", {})[0] == 200
    finally:
        shutil.rmtree(twin)


@pytest.fixture
def serve(repository):
    """serve(*arguments): `scaphoid-serve` on the repository, which ends with the test at the latest."""
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen:
            command = [sys.executable, "-m", "scaphoid.triton_repo.serve", str(repository), *arguments]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process

        yield start


# 127.0.0.1, the same in IPv6, and ::1, as the kernel writes them.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listens_on(port: int) -> set[str]:
    """The addresses that anybody listens on at `port`."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    places = [place.split(":") for _, place, _, state, *_ in lines if state == "0A"]
    return {address for address, at in places if at == f"{port:04X}"}


@slow
@pytest.mark.parametrize(
    ("number", "host"), [(signal.SIGINT, "127.0.0.1"), (signal.SIGTERM, "::1"), (signal.SIGKILL, "localhost")]
)
def test_scaphoid_serve_leaves_nothing_behind(serve, number, host):
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    ports = [str(port) for port in free_ports(host if host == "::1" else "127.0.0.1")]
    options = zip(("--http-port", "--grpc-port", "--metrics-port"), ports, strict=True)
    process = serve("--flows", "kalm", "--host", host, "--health-port", "0", *chain(*options))
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "ready after" in line:
            break
    assert ports[1] in lines[-1], lines
    for port in ports:
        assert listens_on(int(port))
        assert listens_on(int(port)) <= LOOPBACK
    place = "[::1]" if host == "::1" else host
    for address in (f"{place}:{ports[1]}", f"http://{place}:{ports[0]}"):
        with Client(address, "kalm") as client:
            assert client.infer(png(1)).server == address
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    code = process.wait(60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)

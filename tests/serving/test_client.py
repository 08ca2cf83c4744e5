"""The asynchronous client against a server in this process."""

import asyncio
import subprocess
import sys

import grpc
import numpy as np
import pytest

from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import FlowClient, RequestFailed, RequestRejected, ServerUnavailable, wanted_outputs


def ask(server, encoded=b"bytes of an image", flow="msfm", parts=True, **settings):
    async def once():
        async with FlowClient(server.url, flow, wanted_outputs(flow, parts), **settings) as client:
            await client.connect()
            return await client.predict(encoded)

    return asyncio.run(once())


def test_without_parts_their_outputs_are_not_asked_for(fake_server):
    outputs = ask(fake_server, parts=False)
    asked = set(fake_server.asked[0])
    assert asked == set(FLOWS["msfm"].outputs) - {"parts_probability", "probability_with_parts"}
    assert "parts" not in [step.name for step in FLOWS["msfm"].steps_for(asked)]
    assert set(outputs) == asked


def test_outputs_come_without_the_batch_dimension(fake_server):
    outputs = ask(fake_server)
    assert outputs["window_boxes"].shape == (7, 4)
    np.testing.assert_array_equal(outputs["box"], np.array([4.5, 6.25, 40.0, 30.75], np.float32))


def test_newest_version_is_numeric_and_names_its_weights(fake_server):
    fake_server.versions = ("9", "10", "2")

    async def version():
        async with FlowClient(fake_server.url, "kalm", wanted_outputs("kalm", True)) as client:
            await client.connect()
            await client.predict(b"an image")
            return client.version

    assert asyncio.run(version()) == "10@3f2a9c1b"
    assert fake_server.asked_version == ["10"]
    fake_server.weights = ""  # a repository that assemble did not write
    assert asyncio.run(version()) == "10"


def test_unknown_flow_names_those_there_are():
    with pytest.raises(ValueError, match=r"'mfsm'.*msfm, msfm_fma, kalm"):
        wanted_outputs("mfsm", True)


def test_no_server_says_what_to_do(fake_server):
    fake_server.stop()
    with pytest.raises(ServerUnavailable, match=f"{fake_server.url}.*scaphoid-serve.*--url"):
        ask(fake_server)


def test_server_not_ready(fake_server):
    fake_server.ready = False
    with pytest.raises(ServerUnavailable, match="not ready"):
        ask(fake_server)


def test_flow_or_output_not_served(fake_server):
    del fake_server.flows["kalm"]
    with pytest.raises(ServerUnavailable, match="does not serve flow kalm"):
        ask(fake_server, flow="kalm")
    fake_server.flows["msfm"] = ("probability",)
    with pytest.raises(ServerUnavailable, match="has no output box"):
        ask(fake_server)


@pytest.mark.parametrize(
    ("status", "raised", "message"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, RequestRejected, "refused by the server: why"),
        (grpc.StatusCode.INTERNAL, RequestFailed, "server error INTERNAL: why"),
        (grpc.StatusCode.UNAVAILABLE, RequestFailed, "server error UNAVAILABLE: why"),  # a full queue: the server lives
    ],
)
def test_errors_by_whose_fault_they_are(fake_server, refusal, status, raised, message):
    fake_server.behave = refusal(status, "why\nand a stack trace")
    with pytest.raises(raised) as error:
        ask(fake_server)
    assert str(error.value) == message


def test_time_limit(fake_server, slow):
    fake_server.behave = slow(1.0)
    with pytest.raises(RequestFailed, match=r"no answer within 0\.2 s"):
        ask(fake_server, timeout_s=0.2)


def test_server_gone_in_the_middle(fake_server, slow):
    fake_server.behave = lambda encoded, attempt: (fake_server.stop(), slow(1.0)(encoded, attempt))
    with pytest.raises(ServerUnavailable, match="went away"):
        ask(fake_server)


def test_client_imports_no_torch():
    code = (
        "import sys; import scaphoid.triton_repo.predict; "
        "heavy = {'torch', 'timm', 'openvino', 'nvidia.dali'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr

"""Triage over the client library, against a server in this process: who is asked what, and what is answered."""

import asyncio

import grpc
import numpy as np
import pytest

from scaphoid.trainer.band import FIRST, NOBODY, Answerer, Band, BandError, Fitted
from scaphoid.trainer.data.dicom import to_pgm
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import RequestRejected, ServerUnavailable
from scaphoid.triton_repo.triage import TriageClient, Triaged


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (47, 61), dtype=np.uint8)


def fitted(server, band: Band) -> Fitted:
    """Fitted on the answers of the weights that the server has at present."""
    return Fitted(band, Answerer("msfm", server.weights, parts=True), {})


def ask(server, band: Band | Fitted, images, flow: str = "msfm", in_flight: int = 1, **settings) -> list:
    async def run():
        async with TriageClient(server.url, band, flow, **settings) as client:
            return await client.predict_all(images, in_flight)

    return asyncio.run(run())


@pytest.mark.parametrize("flow", FIRST)
def test_outside_the_band_the_first_stage_alone_is_asked(fake_server, flow):
    (triaged,) = ask(fake_server, NOBODY, [pixels(1)], flow)
    assert fake_server.asked == [(FIRST[flow],)]
    assert not triaged.whole
    assert triaged.probability == next(iter(triaged.result.stages.values()))
    assert triaged.result.box is None


@pytest.mark.parametrize("flow", FLOWS)
def test_a_first_stage_is_asked_where_that_saves_encoders(flow):
    """KALM's own comes out of its last step."""

    def encoders(outputs) -> int:
        return sum(step.stage.kind == "encoder" for step in FLOWS[flow].steps_for(outputs))

    first = FIRST.get(flow, "global_probability")
    assert (encoders([first]) <= encoders(FLOWS[flow].outputs) - 2) == (flow in FIRST)


def test_within_the_band_the_whole_flow_answers(fake_server):
    (triaged,) = ask(fake_server, Band(0, 1), [pixels(1)])
    assert [set(names) for names in fake_server.asked] == [{"main_probability"}, set(FLOWS["msfm"].outputs)]
    assert triaged.whole
    assert triaged.probability == triaged.result.probability_with_parts
    assert triaged.result.box is not None
    assert fake_server.sent[0] == fake_server.sent[1]


def test_the_band_decides_image_by_image(fake_server):
    images = [pixels(seed) for seed in range(12)]
    first = [each.probability for each in ask(fake_server, NOBODY, images)]
    band = Band(0.3, 0.7)
    found = ask(fake_server, band, images)
    assert [each.whole for each in found] == band.holds(first).tolist()
    assert {each.whole for each in found} == {True, False}
    (without_parts,) = ask(fake_server, Band(0, 1), images[:1], parts=False)
    assert without_parts.probability == without_parts.result.probability


def test_one_bad_image_takes_no_other_along(fake_server, refusal):
    bad = pixels(3)
    fake_server.behave = refusal(grpc.StatusCode.INVALID_ARGUMENT, "blank radiograph", of=to_pgm(bad))
    good, refused, last = ask(fake_server, Band(0, 1), [pixels(1), bad, pixels(2)])
    assert isinstance(refused, RequestRejected)
    assert isinstance(good, Triaged)
    assert isinstance(last, Triaged)


@pytest.mark.parametrize("whole", [False, True])
def test_a_server_that_is_gone_is_waited_for_once(fake_server, whole):
    """In the first call or the second."""

    def stop(encoded, attempt):
        if len(fake_server.asked[-1]) > 1 or not whole:
            fake_server.stop()

    fake_server.behave = stop
    answers = ask(fake_server, Band(0, 1), map(pixels, range(20)), in_flight=4, timeout_s=0.5)
    assert len(answers) == 20
    assert all(isinstance(answer, ServerUnavailable) for answer in answers[-10:])
    waited = {id(answer) for answer in answers if isinstance(answer, ServerUnavailable)}
    assert len(waited) <= 4  # those in flight have an error each, and what is left one of these


def test_calls_of_both_kinds_are_bounded_together(fake_server, slow):
    fake_server.behave = slow(0.02)
    answers = []

    async def run():
        async with TriageClient(fake_server.url, Band(0.4, 0.6), in_flight=2) as client:
            answers.extend(await client.predict_all(map(pixels, range(24))))

    asyncio.run(run())
    assert {answer.whole for answer in answers} == {True, False}
    assert fake_server.most_in_flight == 2


def test_one_image_or_nobody_to_ask_is_refused(fake_server):
    for image in ("hand.png", b"bytes", pixels(1)):
        with pytest.raises(TypeError, match="pass a list"):
            ask(fake_server, NOBODY, image)
    with pytest.raises(ValueError, match="expected a whole in_flight >= 1, got 0"):
        ask(fake_server, NOBODY, [pixels(1)], in_flight=0)
    assert not fake_server.sent


def test_a_triage_that_is_not_connected_says_so_and_closes(fake_server):
    async def run():
        client = TriageClient(fake_server.url, NOBODY)
        await client.__aexit__(None, None, None)
        with pytest.raises(RuntimeError, match="not connected: use it inside"):
            await client.predict_all([pixels(1)])

    asyncio.run(run())


def test_a_fitted_band_brings_its_flow_and_parts(fake_server):
    band = Fitted(Band(0, 1), Answerer("msfm_fma", fake_server.weights, parts=False), {})
    (triaged,) = ask(fake_server, band, [pixels(1)])
    assert triaged.whole
    assert "probability_with_parts" not in fake_server.asked[-1]


def test_a_band_of_other_weights_is_refused(fake_server):
    band = fitted(fake_server, NOBODY)
    fake_server.weights = "77aa00ff"
    with pytest.raises(BandError, match="fitted on weights 3f2a9c1b, the server's are 77aa00ff: fit one"):
        ask(fake_server, band, [pixels(1)])
    assert not fake_server.sent


def test_weights_that_were_switched_meanwhile_answer_whole(fake_server):
    """The first stage of other weights does not settle what the band was not fitted on."""

    async def run() -> list[bool]:
        whole = []
        async with TriageClient(fake_server.url, fitted(fake_server, NOBODY)) as client:
            whole.append((await client.predict(pixels(1))).whole)
            fake_server.versions, fake_server.weights = ("2",), "77aa00ff"
            whole.append((await client.predict(pixels(2))).whole)
            whole.append((await client.infer(to_pgm(pixels(3))))[1])
        return whole

    assert asyncio.run(run()) == [False, True, True]


@pytest.mark.parametrize("flow", ["kalm", "msfn"])
def test_a_flow_without_a_first_stage_is_named(flow):
    with pytest.raises(ValueError, match=f"flow '{flow}' has no first stage to ask: expected one of msfm"):
        TriageClient("127.0.0.1:1", NOBODY, flow)

"""What the client library sends again, how long it waits, and which images it sends no more."""

import logging
import threading
import time

import grpc
import pytest

from scaphoid.trainer.data.dicom import to_pgm
from scaphoid.triton_repo.client import (
    Client,
    DeadlineExceeded,
    Quarantine,
    Quarantined,
    RequestFailed,
    Result,
)
from scaphoid.triton_repo.requests.quarantine import STRIKES

IMAGE = b"bytes of an image"
STATUS = grpc.StatusCode


def test_a_full_queue_is_asked_again_after_a_pause(fake_server, refusal, ask):
    fake_server.behave = refusal(STATUS.UNAVAILABLE, "Exceeds maximum queue size", attempts=3)
    began = time.monotonic()
    ask(fake_server)
    assert len(fake_server.sent) == 4
    assert len(set(fake_server.ids)) == 1
    assert time.monotonic() - began > 0.5 * (0.05 + 0.1 + 0.2)


def test_a_server_that_goes_on_refusing_is_an_error_within_the_time_limit(fake_server, refusal, ask):
    fake_server.behave = refusal(STATUS.UNAVAILABLE, "Exceeds maximum queue size")
    with pytest.raises(RequestFailed, match="server error UNAVAILABLE: Exceeds") as error:
        ask(fake_server, timeout_s=0.4)
    assert error.value.request_id == fake_server.ids[0]
    assert 2 < len(fake_server.sent) < 9
    fake_server.sent.clear()
    with pytest.raises(RequestFailed):
        ask(fake_server, retry_s=0)
    assert len(fake_server.sent) == 1


def test_what_began_and_failed_is_sent_once_more_alone(fake_server, refusal, pixels):
    victim = to_pgm(pixels(5))
    fail = refusal(STATUS.INTERNAL, "the batch failed", of=victim, attempts=1)
    fake_server.behave = lambda encoded, attempt: (time.sleep(0.01), fail(encoded, attempt))
    with Client(fake_server.url, in_flight=4) as client:
        results = client.predict_all(map(pixels, range(12)))
    assert all(isinstance(result, Result) for result in results)
    first, again = (place for place, sent in enumerate(fake_server.sent) if sent == victim)
    assert fake_server.alone[again]
    assert fake_server.ids[first] == fake_server.ids[again]
    assert len(fake_server.sent) == 13


def test_an_image_that_fails_every_time_is_quarantined_by_its_content(fake_server, refusal, tmp_path, pixels):
    bad = pixels(2)
    fake_server.behave = refusal(STATUS.INTERNAL, "engine lost", of=to_pgm(bad))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    with Client(fake_server.url, quarantine=quarantine) as client:
        for strikes in range(STRIKES):
            assert len(quarantine) == 0
            assert len(fake_server.sent) == 2 * strikes
            with pytest.raises(RequestFailed, match=r"engine lost \(tried twice, the second time alone\)"):
                client.predict(bad)
        with pytest.raises(Quarantined, match=r"not sent.*engine lost"):
            client.predict(bad)
        client.predict(pixels(1))
    assert len(fake_server.sent) == 2 * STRIKES + 1
    again = Quarantine(tmp_path / "quarantine.jsonl")
    assert again.reason(to_pgm(bad)) == quarantine.reason(to_pgm(bad))
    assert len(again) == 1
    (tmp_path / "quarantine.jsonl").write_text("a list of names\n")
    with pytest.raises(ValueError, match="line 1 is not a quarantined image"):
        Quarantine(tmp_path / "quarantine.jsonl")


def test_a_server_that_answers_nobody_blames_no_image(fake_server, refusal, pixels):
    fake_server.behave, fake_server.canary_fails = refusal(STATUS.INTERNAL, "engine lost"), True
    with Client(fake_server.url, timeout_s=1.0) as client:
        for _ in range(STRIKES):
            with pytest.raises(RequestFailed, match=r"INTERNAL: engine lost; then .*answers nobody"):
                client.predict(pixels(2))
        assert client.quarantine.reason(to_pgm(pixels(2))) is None
    assert len(fake_server.sent) == STRIKES


def test_a_server_that_answers_again_is_waited_for(fake_server, refusal, pixels):
    """As when its backend's process died and it is being restarted: nothing is lost, nobody is blamed."""
    fake_server.behave, fake_server.canary_fails = refusal(STATUS.INTERNAL, "process died", attempts=1), True
    threading.Timer(0.5, lambda: setattr(fake_server, "canary_fails", False)).start()
    with Client(fake_server.url) as client:
        results = client.predict_all(map(pixels, range(6)))
        assert not client.quarantine._strikes
    assert all(isinstance(result, Result) for result in results), results


def test_time_limit(fake_server, slow):
    fake_server.behave = slow(1.0)
    began = time.monotonic()
    with Client(fake_server.url, timeout_s=0.2) as client:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s"):
            client.infer(IMAGE)
        assert time.monotonic() - began < 0.9
        fake_server.behave = slow(0)
        client.infer(IMAGE)
    assert len(fake_server.sent) == 2


def test_a_request_that_nobody_waits_for_keeps_its_place(fake_server, slow):
    fake_server.behave = slow(1.0)
    with Client(fake_server.url, timeout_s=0.2, in_flight=2) as client:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                client.infer(IMAGE)
    assert len(fake_server.sent) == 2


def test_a_quarantine_outlives_a_cut_line_and_a_full_disk(fake_server, refusal, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "scaphoid.client")
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    for _ in range(STRIKES):
        quarantine.strike(IMAGE, "engine lost")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    again = Quarantine(path)
    assert "line 3 was cut" in caplog.text
    assert again.reason(IMAGE) == "engine lost"
    for _ in range(STRIKES):
        again.strike(b"another", "why")
    assert Quarantine(path).reason(b"another") == "why"
    fake_server.behave = refusal(STATUS.INTERNAL, "engine lost")
    unwritable = Quarantine(tmp_path / "missing" / "file")
    with Client(fake_server.url, quarantine=unwritable) as client, pytest.raises(RequestFailed, match="engine lost"):
        client.infer(IMAGE)
    assert "the strike is not kept" in caplog.text

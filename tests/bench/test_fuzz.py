"""The fuzzer without a server: its cases can be had again, its judgement sees what it is there to see."""

import dataclasses
import random

import numpy as np
import pytest

from scaphoid.bench import fuzz as fuzzer
from scaphoid.bench import malformed as requests
from scaphoid.bench.fuzz import Findings, Fuzz, report
from scaphoid.bench.mutations import OWN, PATIENT, mutant, originals
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.triton_repo.client import Outputs
from scaphoid.triton_repo.inputs import load_image

TARGET = requests.Target("127.0.0.1:1", "127.0.0.1:2", "kalm", originals()["png"])
GOOD = {"probability": np.array([0.5]), "local_probability": np.array([1.0]), "box": np.array([1.0, 2, 30, 40])}


@pytest.mark.parametrize("name", originals())
def test_originals_are_sound(name):
    loaded = load_image(originals()[name])
    assert (loaded.width, loaded.height) == (97, 83)


def test_the_same_number_is_the_same_case():
    assert [mutant(number) for number in range(60)] == [mutant(number) for number in range(60)]
    assert len({mutant(number).encoded for number in range(60)}) > 50


def refusal(encoded: bytes) -> str | None:
    try:
        load_image(encoded)
    except RejectedImage as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF tags
def test_the_guard_bears_damage_and_says_why():
    """What the fuzzer sends to a server, through the client's own check: every refusal is a line of text."""
    cases = {number: mutant(number) for number in range(900)}
    refused = {number: error for number, case in cases.items() if (error := refusal(case.encoded)) is not None}
    assert {number: error for number, error in refused.items() if fuzzer._unclear(error)} == {}
    assert 300 < len(refused) < 800
    assert {case.what.split(":")[0] for case in cases.values()} == set(originals())
    assert set(OWN) == {name.split()[0] for name in originals()}


@pytest.mark.parametrize("make", [*requests.HTTP_REQUESTS, *requests.GRPC_REQUESTS])
def test_malformed_requests_are_bounded_and_differ(make):
    made = {make(TARGET, random.Random(seed)) for seed in range(12)}
    assert max(map(len, made)) < 2**24
    assert len(made) > 1 or make in (requests.http_json_nested, requests.grpc_batch)


def test_a_request_to_nobody_is_an_error_of_the_connection():
    over_http = next(seed for seed in range(50) if random.Random(seed).random() < 0.5)
    with pytest.raises(OSError, match="refused"):
        requests.malformed(TARGET, over_http)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        ("refused by the server: truncated: the PNG file ends inside a chunk", ""),
        ("", "without a reason"),
        ("server error INTERNAL: out of memory", "without a reason"),
        ("two\nlines", "more than a line"),
        ("x" * 400, "more than a line"),
        ("cannot be read (IndexError)", "nobody expected"),
        (f"a file of {PATIENT}", "patient"),
    ],
)
def test_an_error_has_to_say_why(error, problem):
    assert problem in fuzzer._unclear(error)
    assert bool(problem) == bool(fuzzer._unclear(error))


@pytest.mark.parametrize(
    "change",
    [{"probability": [1.2]}, {"local_probability": [float("nan")]}, {"box": [5, 2, 5, 40]}, {"box": [-1, 0, 3, 4]}],
)
def test_an_implausible_answer_is_seen(change):
    tensors = {name: np.array(value, float) for name, value in (GOOD | change).items()}
    assert fuzzer._implausible(Outputs(tensors, "", "", ""))
    assert not fuzzer._implausible(Outputs(GOOD, "", "", ""))


def test_problems_are_a_missed_bar(tmp_path):
    arguments, found = Fuzz(tmp_path, cases=3), Findings()
    assert not report(arguments, found, None).missed
    found = dataclasses.replace(found, problems=["case 7: answered wrongly"])
    written = report(arguments, found, None)
    assert written.missed
    assert "case 7: answered wrongly" in written.markdown()

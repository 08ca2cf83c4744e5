"""Drift of served predictions: the index against a hand-computed one, on samples that drifted and that did not."""

import json
import math

import numpy as np
import pytest

from scaphoid.export.reference import ACTIVATION, histogram, reference
from scaphoid.trainer.journal import Prediction
from scaphoid.triton_repo.monitoring import drift_command
from scaphoid.triton_repo.monitoring.drift import MOST_WATCHED, WINDOW, JournalReader, chance, references_of, stability
from scaphoid.triton_repo.monitoring.metrics import buckets
from scaphoid.triton_repo.versioning.versions import CONTENT, VERSIONS, weights_hash

WEIGHTS = [{"sha256": "a"}]
VERSION = f"1@{weights_hash({'weights': WEIGHTS})}"
RNG = np.random.default_rng(5)


def answers(count: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    """A flow's outputs on `count` images; `shift` moves everything that is watched."""
    return {
        "probability": 1 / (1 + np.exp(-RNG.normal(shift, 1, (count, 1)))),
        "margin": RNG.gamma(2 + shift, 0.1, (count, 1)),
        "window_scores": RNG.normal(3 + shift, 0.5, (count, 7)),
    }


def lines(found: dict[str, np.ndarray], **also: object) -> list[str]:
    """The journal's lines about such outputs."""
    rest = {"study": "s", "flow": "msfm", "model_version": VERSION, "parts": False, "status": "ok", "threshold": 0.5}
    return [
        Prediction(
            image=f"{number}.png",
            probability=float(found["probability"][number, 0]),
            margin=float(found["margin"][number, 0]),
            windows=[{"box": [0, 0, 1, 1], "score": float(score)} for score in found["window_scores"][number]],
            **(rest | also),
        ).line()
        for number in range(len(found["probability"]))
    ]


def content(images: int = 256) -> dict:
    parity = {"passed": True, "failures": [], "images": {"origin": "drawn numbers"}}
    known = {"flows": ["msfm"], "weights": WEIGHTS, "parity": parity}
    return known | {"reference": {"msfm": reference(answers(images))}}


def test_the_index_is_the_textbooks():
    expected, found = (10 + 0.5, 30 + 0.5), (25 + 0.5, 15 + 0.5)
    shares = [[part / sum(each) for part in each] for each in (expected, found)]
    textbook = sum((b - a) * math.log(b / a) for a, b in zip(*shares, strict=True))
    assert stability([10, 30], [25, 15]) == pytest.approx(textbook)
    assert stability([10, 30, 0], [10, 30, 0]) == 0
    assert math.isfinite(stability([10, 0], [0, 10]))
    with pytest.raises(ValueError, match="argument 2"):
        stability([1, 2], [1, 2, 3])


def test_a_reference_has_equal_shares_and_its_edges_fit():
    found = reference(answers(1000))
    assert set(found) == {"probability", "margin", ACTIVATION}
    for each in found.values():
        assert len(each["edges"]) == 9
        assert set(each["counts"]) == {100}
    assert reference({"probability": np.full((7, 1), 0.5), "margin": np.full((7, 1), np.inf)}) == {
        "probability": {"edges": [0.5], "counts": [7, 0]},
        "margin": {"edges": [], "counts": [0]},
    }
    assert histogram([0.1, 0.2, 0.25, 9], [0.2, 0.3]) == [2, 1, 1]


def test_chance_is_what_same_samples_exceed_once_in_a_hundred():
    edges = np.arange(1, 10) / 10
    draws = [[histogram(RNG.uniform(size=size), edges) for size in (256, 200)] for _ in range(2000)]
    limit = chance(10, 256, 200)
    assert 0.003 < np.mean([stability(*pair) > limit for pair in draws]) < 0.02


@pytest.fixture
def drifts(tmp_path):
    """The verdicts on journals with these lines, by quantity."""

    def judge(*parts: list[str]) -> dict[str, str]:
        path = tmp_path / "predictions.jsonl"
        path.write_text("".join(line for part in parts for line in part))
        reader = JournalReader([path, tmp_path / "not there yet"])
        reader.read()
        return {each.quantity: each.verdict for each in reader.drifts(references_of([content()]))}

    return judge


def test_drifted_samples_are_told_from_others(drifts):
    same, moved = answers(400), answers(400, shift=1.0)
    assert set(drifts(lines(same)).values()) == {"stable"}
    assert drifts(lines(moved)) == dict.fromkeys(("probability", "margin", ACTIVATION), "drift")
    brighter = same | {"window_scores": moved["window_scores"]}
    assert drifts(lines(brighter)) == {"probability": "stable", "margin": "stable", ACTIVATION: "drift"}
    assert set(drifts(lines(answers(8, shift=0.3))).values()) == {"stable"}  # too few to say
    assert set(drifts(lines(moved), lines(answers(WINDOW))).values()) == {"stable"}  # the latest count
    assert drifts(lines(moved, model_version="2@another1"), lines(moved, status="failed")) == {}


def test_a_growing_journal_is_read_once(tmp_path):
    path, found = tmp_path / "predictions.jsonl", lines(answers(30))
    reader = JournalReader([path])
    path.write_text("".join(found[:10]) + "no JSON\n" + found[10][:40])
    reader.read()
    assert reader.counts == {("msfm", "ok"): 10}
    path.write_text("".join(found[:10]) + "no JSON\n" + "".join(found[10:]))
    reader.read()
    reader.read()
    assert reader.counts == {("msfm", "ok"): 30}
    (watched,) = reader.watched.values()
    assert buckets(watched)[-1] == ("+Inf", 30)
    assert watched.total == pytest.approx(sum(json.loads(line)["probability"] for line in found))
    path.write_text(found[0])  # begun anew
    reader.read()
    assert reader.counts == {("msfm", "ok"): 31}


def test_one_bad_line_harms_no_other(tmp_path):
    path, (good,) = tmp_path / "predictions.jsonl", lines(answers(1))
    known = json.loads(good)
    wrong = [{"probability": value} for value in (math.nan, 1.5, -0.1, math.inf, 10**400, None, "x")]
    wrong += [{"model_version": value} for value in ("1@a\n", "x" * 65, '"}')]
    wrong += [{"flow": "mfsm"}, {"flow": []}, {"status": "?"}, {"margin": math.nan}, {"windows": [{"score": math.inf}]}]
    bad = [json.dumps(known | each) for each in wrong] + ["[" * 200_000, '{"a":' * 200_000, "[]", "7", "\x00"]
    path.write_text("".join(f"{each}\n{good}" for each in bad))
    reader = JournalReader([path])
    reader.read()
    assert reader.counts == {("msfm", "ok"): len(bad)}
    assert list(reader.watched) == [("msfm", VERSION)]


def test_the_versions_that_are_watched_are_bounded_to_the_latest(tmp_path):
    path, (good,) = tmp_path / "predictions.jsonl", lines(answers(1))
    path.write_text(
        "".join(json.dumps(json.loads(good) | {"model_version": f"{n}@x"}) + "\n" + good for n in range(99))
    )
    reader = JournalReader([path])
    reader.read()
    assert len(reader.watched) == MOST_WATCHED
    assert reader.watched["msfm", VERSION].probabilities.total() == 99


def test_lines_that_were_not_counted_are_read_again(tmp_path, monkeypatch):
    path, found = tmp_path / "predictions.jsonl", lines(answers(3))
    path.write_text("".join(found))
    reader, count = JournalReader([path]), JournalReader._count

    def interrupted(self, line):
        if line == found[1].encode():
            raise MemoryError
        count(self, line)

    monkeypatch.setattr(JournalReader, "_count", interrupted)
    with pytest.raises(MemoryError):
        reader.read()
    monkeypatch.undo()
    reader.read()
    assert reader.counts == {("msfm", "ok"): 3}


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "repository" / VERSIONS / "1"
    folder.mkdir(parents=True)
    (folder / CONTENT).write_text(json.dumps(content()))
    journal = tmp_path / "predictions.jsonl"
    journal.write_text("".join([*lines(answers(300, shift=1.0)), *lines(answers(3), model_version="9@x")]))
    words = [str(tmp_path / "repository"), str(journal)]
    drift_command.main([*words, "--json"])
    told = capsys.readouterr()
    assert [each["verdict"] for each in json.loads(told.out)] == ["drift"] * 3
    assert "no reference for msfm 9@x" in told.err
    drift_command.main(words)
    assert "drawn numbers" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not a file"):
        drift_command.main([words[0], str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="nowhere is not a model repository"):
        drift_command.main([str(tmp_path / "nowhere"), str(journal)])
    journal.write_text("")
    with pytest.raises(SystemExit, match="no prediction of a version"):
        drift_command.main(words)


MARGIN = {"edges": [0.1, 0.2], "counts": [1, 2, 3]}


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        ({"reference": "x"}, "reference: expected an object"),
        ({"reference": {"msfm": {"margin": {}}}}, r"reference\.msfm\.margin\.edges: expected a list"),
        ({"reference": {"msfm": {"margin": MARGIN | {"edges": "x"}}}}, "edges: expected a list"),
        ({"reference": {"msfm": {"margin": MARGIN | {"counts": [1]}}}}, "counts: expected 3 of them"),
        ({"weights": None}, "weights: expected a list"),
        ({"parity": {}}, r"parity\.passed: expected"),
        ("[]", "is no JSON object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "flows: expected some of .* got nothing"),
        ('{"flows": ["msfm"]}', "weights: expected a list, got nothing"),
    ],
)
def test_an_edited_content_is_refused_in_a_line(tmp_path, edit, place):
    path, journal = tmp_path / VERSIONS / "1" / CONTENT, tmp_path / "predictions.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(edit if isinstance(edit, str) else json.dumps(content() | edit))
    journal.write_text("".join(lines(answers(3))))
    with pytest.raises(SystemExit, match=rf"^scaphoid-serve drift: [^\n]*content\.json[^\n]*{place}[^\n]*again$"):
        drift_command.main([str(tmp_path), str(journal)])

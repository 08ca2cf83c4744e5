"""`scaphoid-predict --triage`: who gets a box, what is written of who does not, and which bands are refused."""

import csv
import json

import grpc
import pytest

from scaphoid.trainer.band import FIRST, Answerer, Band, Fitted, write_band
from scaphoid.trainer.data.index import Index, Radiograph, write_index
from scaphoid.trainer.evaluate import evaluate
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.predictions import read_predictions
from scaphoid.triton_repo.monitoring.drift import JournalReader
from scaphoid.triton_repo.predict import main
from scaphoid.triton_repo.requests.servers import Server

BAND = Band(0.3, 0.7)


@pytest.fixture
def predict(fake_server, radiographs, tmp_path, capsys):
    """predict(arguments...) -> exit code of a triage of the radiographs; what it printed is in `.err` and `.out`."""

    def run(*arguments, band=BAND, report=False):
        fitted = Fitted(band, Answerer("msfm", "3f2a9c1b", parts=True), {})
        write_band(tmp_path / "band.json", fitted)
        flags = ["--url", fake_server.url, "--out", tmp_path / "out", "--report" if report else "--no-report"]
        code = main([str(word) for word in (radiographs, "--triage", tmp_path / "band.json", *flags, *arguments)])
        run.out, run.err = capsys.readouterr()
        return code

    return run


@pytest.fixture
def records(tmp_path):
    """records() -> the lines of the journal."""
    return lambda: [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]


def test_each_line_says_who_answered(predict, records, fake_server, tmp_path):
    assert predict("--csv", "--json") == 0
    found = records()
    whole = [record for record in found if record["whole"]]
    alone = [record for record in found if record["whole"] is False]
    assert len(whole) + len(alone) == 6
    assert whole
    assert alone
    for record in found:
        assert record["band"] == [0.3, 0.7]
        assert record["whole"] == BAND.holds(record["stages"]["main"])
    for record in alone:
        assert record["probability"] == record["stages"]["main"]
        assert record["verdict"] == ("abnormal" if record["probability"] >= 0.5 else "normal")
        assert set(record["stages"]) == {"main"}
        assert record["probability_with_parts"] is record["box"] is record["main_box"] is record["margin"] is None
        assert record["windows"] == []
        assert (record["width"], record["height"]) == (53, 61)
    for record in whole:
        assert record["box"] == [4.5, 6.25, 40.0, 30.75]
        assert record["probability_with_parts"] is not None
    assert len(fake_server.asked) == 6 + len(whole)
    rows = {row["image"]: row for row in csv.DictReader((tmp_path / "out/predictions.csv").open())}
    for record in found:
        row = rows[record["image"]]
        assert row["whole"] == str(record["whole"])
        assert bool(row["box_x0_px"]) == record["whole"]
    studies = [json.loads(line) for line in (tmp_path / "out/studies.jsonl").read_text().splitlines()]
    listed = sorted(image for study in studies for image in study["first_stage_only"])
    assert listed == sorted(record["image"] for record in alone)
    assert json.loads(predict.out)["triage"] == {"band": [0.3, 0.7], "first_stage_only": len(alone)}


def test_the_report_says_where_no_box_was_asked_for(predict, records, tmp_path):
    assert predict("--overlays", report=True) == 0
    alone = sum(record["whole"] is False for record in records())
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('<span class="chip first" title=') == alone
    assert f"{alone} of the 6 images were answered by the first stage alone" in page
    assert page.count("first stage only, no box was asked for") == alone
    assert "outside the band 0.3 to 0.7" in page
    assert f"{alone} by the first stage alone (outside the band 0.3 to 0.7)" in predict.out
    assert "a probability and no box" in predict.out
    assert len(list((tmp_path / "out/overlays").glob("*.png"))) == 6


def test_without_triage_nothing_is_said_of_it(predict, records, radiographs, fake_server, tmp_path):
    main([str(radiographs), "--url", fake_server.url, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out/report.html").read_text()
    assert "Triage" not in page
    assert "first stage" not in page
    assert {(record["whole"], record["band"]) for record in records()} == {(True, None)}


def test_resuming_asks_nothing_again(predict, records, fake_server, tmp_path):
    predict()
    lines, sent = records(), len(fake_server.sent)
    journal = tmp_path / "out/predictions.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    assert predict() == 0
    assert len(fake_server.sent) == sent + sum(1 + line["whole"] for line in lines[4:])
    assert predict("--threshold", "0") == 0
    assert len(fake_server.sent) == sent + sum(1 + line["whole"] for line in lines[4:])
    assert {line["verdict"] for line in records()[-6:]} == {"abnormal"}


@pytest.mark.parametrize("change", ["band", "without"])
def test_another_band_or_none_takes_nothing_over(predict, radiographs, fake_server, tmp_path, change):
    predict()
    before = len(fake_server.sent)
    if change == "band":
        assert predict(band=Band(0.0, 1.0)) == 0
        assert len(fake_server.sent) == before + 12
    else:
        assert main([str(radiographs), "--url", fake_server.url, "--out", str(tmp_path / "out"), "--no-report"]) == 0
        assert len(fake_server.sent) == before + 6
    assert all(record["box"] for record in read_predictions(tmp_path / "out/predictions.jsonl"))


def test_one_image_that_is_refused_takes_no_other_along(predict, records, radiographs, fake_server, refusal):
    first, second = sorted(radiographs.rglob("*.png"))[:2]
    first.write_bytes(first.read_bytes()[:-30])
    message = "in ensemble 'msfm', blank radiograph"
    fake_server.behave = refusal(grpc.StatusCode.INVALID_ARGUMENT, message, of=second.read_bytes())
    assert predict() == 1
    assert f"rejected {second}: refused by the server: blank radiograph" in predict.err
    assert [record["status"] for record in records()].count("ok") == 4
    assert {record["whole"] for record in records() if record["status"] == "rejected"} == {None}


def test_an_image_whose_second_call_is_refused_has_no_verdict(predict, records, fake_server, refusal):
    """The first stage's probability, within the band, is no verdict."""
    refuse = refusal(grpc.StatusCode.INVALID_ARGUMENT, "blank object")

    def refuse_whole(encoded, attempt):
        if len(fake_server.asked[-1]) > 1:
            refuse(encoded, attempt)

    fake_server.behave = refuse_whole
    assert predict("--concurrency", "1", band=Band(0.0, 1.0)) == 1
    assert [record["status"] for record in records()] == ["rejected"] * 6
    assert {record["probability"] for record in records()} == {None}


def test_a_band_that_does_not_fit_is_one_line_and_nothing_is_sent(predict, fake_server, tmp_path):
    for arguments, message in (
        (["--flow", "kalm"], "fitted on msfm, not kalm"),
        (["--no-parts"], "fitted on answers with parts, not without"),
        (["--triage", tmp_path / "nowhere.json"], "No such file or directory; python -m scaphoid.trainer.triage"),
        (["--triage", tmp_path], "Is a directory"),
    ):
        assert predict(*arguments) == 2
        assert message in predict.err
        assert predict.err.count("\n") == 1
    fake_server.weights = "77aa00ff"
    assert predict() == 2
    assert "fitted on weights 3f2a9c1b, the server's are 77aa00ff: fit one on their answers" in predict.err
    (tmp_path / "other.json").write_text('{"low": 0, "high": 1}')
    assert predict("--triage", tmp_path / "other.json") == 2
    assert "other.json is no band" in predict.err
    assert not fake_server.sent


def test_batch_work_waits_behind_a_person(radiographs, fake_server, tmp_path, monkeypatch):
    """Folders and indexes say 2, which a server without priorities takes as it takes everything."""
    asked = []
    infer = Server.infer

    async def note(server, call):
        asked.append(call.priority)
        return await infer(server, call)

    monkeypatch.setattr(Server, "infer", note)
    image = next(radiographs.rglob("*.png"))
    row = Radiograph(str(image.relative_to(radiographs)), "p", "s", "", "wrist", 0, None, 53, 61, "all")
    index = write_index(Index(radiographs, (row,)))
    for number, (arguments, priority) in enumerate(
        (([image], 0), ([radiographs], 2), (["--index", index], 2), ([image, "--index", index], 0))
    ):
        asked.clear()
        main([*map(str, arguments), "--url", fake_server.url, "--out", str(tmp_path / f"out{number}"), "--no-report"])
        assert set(asked) == {priority}, arguments


def test_an_evaluation_counts_who_has_no_box_as_missed(predict, radiographs, tmp_path):
    predict()
    rows = [
        Radiograph(
            str(path.relative_to(radiographs)), path.parts[-3], path.parts[-2], "", "wrist",
            number % 2, ((4.0, 6.0, 40.0, 31.0),) if number % 2 else (), 53, 61, "all",
        )
        for number, path in enumerate(sorted(radiographs.rglob("*.png")))
    ]  # fmt: skip
    records = read_predictions(tmp_path / "out/predictions.jsonl")
    report = evaluate(Index(radiographs, tuple(rows)), records, map_size=(14, 14))
    alone = {record["image"] for record in records if not record["whole"]}
    missed = sum(str(radiographs / row.image) in alone for row in rows if row.boxes)
    assert missed
    assert report["counts"]["first stage only"] == len(alone)
    found = report["localization"]["together"]
    assert (found["image"], found["without box"]) == (3, missed)
    assert found["methods"]["msfm"]["pcl_0.5"].value == pytest.approx(1 - missed / 3)
    assert set(report["classification"]) == {"probability", "main_probability", "probability_with_parts"}
    assert report["classification"]["probability_with_parts"]["image"]["together"]["image"] == 6
    with pytest.raises(ValueError, match=r"of one triage or of none, got the bands \[0\.3, 0\.7\], none"):
        evaluate(Index(radiographs, tuple(rows)), [records[0] | {"band": None}, *records[1:]])


def test_drift_is_not_told_from_the_uncertain_alone(predict, tmp_path):
    predict()
    reader = JournalReader([tmp_path / "out/predictions.jsonl"])
    reader.read()
    assert reader.counts["msfm", "ok"] == 6
    assert not reader.watched


def test_every_flow_with_a_first_stage_has_its_score():
    for flow, output in FIRST.items():
        assert output in FLOWS[flow].outputs

"""`scaphoid-predict` as a user runs it, against a server in this process."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import grpc
import pytest
from PIL import Image

from scaphoid.trainer.data.index import Index, Radiograph, write_index
from scaphoid.trainer.journal import read_predictions
from scaphoid.triton_repo.predict import main


@pytest.fixture
def predict(fake_server, tmp_path, capsys):
    """predict(arguments...) -> exit code; what it printed is in `.err` (with the wrapping undone) and `.out`."""

    def run(*arguments, report=False):
        flags = ["--url", fake_server.url, "--out", str(tmp_path / "out"), "--report" if report else "--no-report"]
        run.code = main([*map(str, arguments), *flags])
        run.out, run.err = capsys.readouterr()
        return run.code

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_per_image_and_per_study(predict, radiographs, fake_server, tmp_path):
    assert predict(radiographs, "--csv", "--json") == 0
    records = lines(tmp_path / "out/predictions.jsonl")
    assert len(records) == 6
    for record in records:
        assert record["schema"] == "scaphoid.prediction/1"
        assert record["status"] == "ok"
        assert (record["width"], record["height"]) == (53, 61)
        assert record["box"] == [4.5, 6.25, 40.0, 30.75]
        assert record["request_id"] in fake_server.ids
        assert set(record["stages"]) == {"main", "object", "parts"}
        assert len(record["windows"]) == 7
        assert record["verdict"] == ("abnormal" if record["probability_with_parts"] >= 0.5 else "normal")
    studies = lines(tmp_path / "out/studies.jsonl")
    assert {study["study"] for study in studies} == {
        "XR_WRIST/patient00001/study1_positive",
        "XR_WRIST/patient00002/study1_negative",
        "XR_WRIST/patient00002/study2_negative",
    }
    for study in studies:
        scores = [record["probability_with_parts"] for record in records if record["study"] == study["study"]]
        assert len(study["images"]) == len(scores) == 2
        assert study["probability"] == pytest.approx(sum(scores) / 2)
        assert study["verdict"] == ("abnormal" if study["probability"] >= 0.5 else "normal")
    assert [study["probability"] for study in studies] == sorted((s["probability"] for s in studies), reverse=True)
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert [float(row["box_x1_px"]) for row in rows] == [40.0] * 6
    assert json.loads(predict.out)["images"] == {"ok": 6, "rejected": 0, "failed": 0}


def test_without_parts_the_verdict_rests_on_main_and_object(predict, radiographs, fake_server, tmp_path):
    predict(radiographs, "--no-parts", "--threshold", "0.3")
    assert not any("parts_probability" in names for names in fake_server.asked)
    for record in lines(tmp_path / "out/predictions.jsonl"):
        assert record["probability_with_parts"] is None
        assert record["verdict"] == ("abnormal" if record["probability"] >= 0.3 else "normal")


def test_kalm_has_a_key_area_and_no_windows(predict, radiographs, tmp_path):
    assert predict(radiographs, "--flow", "kalm", report=True) == 0
    record = lines(tmp_path / "out/predictions.jsonl")[0]
    assert set(record["stages"]) == {"global", "local"}
    assert record["box"] is not None
    assert record["main_box"] is None
    assert record["windows"] == []


def test_requests_in_flight_are_bounded(predict, radiographs, fake_server, slow):
    fake_server.behave = slow(0.05)
    predict(radiographs, "--concurrency", "3")
    assert fake_server.most_in_flight <= 3


def test_second_run_sends_nothing_and_repeats_no_line(predict, radiographs, fake_server, tmp_path):
    predict(radiographs)
    first = (tmp_path / "out/predictions.jsonl").read_bytes()
    predict(radiographs)
    assert len(fake_server.sent) == 6
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == first


def test_no_resume_predicts_anew_and_the_later_line_counts(predict, radiographs, fake_server, tmp_path):
    predict(radiographs)
    predict(radiographs, "--no-resume")
    assert len(fake_server.sent) == 12
    assert len(lines(tmp_path / "out/predictions.jsonl")) == 12
    assert len(lines(tmp_path / "out/studies.jsonl")) == 3
    assert len(read_predictions(tmp_path / "out/predictions.jsonl")) == 6


@pytest.mark.parametrize("change", ["content", "version", "weights", "flow", "parts"])
def test_what_changed_is_predicted_again(predict, radiographs, fake_server, change):
    predict(radiographs, "--no-parts")
    if change == "content":
        path = next(radiographs.rglob("*.png"))
        Image.new("L", (70, 51), 99).save(path)
    if change == "version":
        fake_server.versions = ("1", "2")
    if change == "weights":
        fake_server.weights = "77aa00ff"
    predict(radiographs, *{"flow": ["--flow", "msfm_fma", "--no-parts"], "parts": []}.get(change, ["--no-parts"]))
    assert len(fake_server.sent) == (7 if change == "content" else 12)


def test_new_threshold_judges_again_without_the_server(predict, radiographs, fake_server, tmp_path):
    predict(radiographs)
    predict(radiographs, "--threshold", "0")
    assert len(fake_server.sent) == 6
    latest = read_predictions(tmp_path / "out/predictions.jsonl")
    assert {prediction.verdict for prediction in latest.values()} == {"abnormal"}


def test_half_written_line_is_cut_off_and_its_image_predicted_again(predict, radiographs, fake_server, tmp_path):
    predict(radiographs)
    journal = tmp_path / "out/predictions.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    assert predict(radiographs) == 0
    assert len(fake_server.sent) == 7
    assert len({record["image"] for record in lines(journal)}) == len(lines(journal)) == 6


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_goes_on_where_it_stopped(predict, radiographs, fake_server, slow, tmp_path, how):
    fake_server.behave = slow(0.4)
    command = [
        sys.executable,
        "-m",
        "scaphoid.triton_repo.predict",
        str(radiographs),
        "--concurrency",
        "1",
        "--no-report",
    ]
    process = subprocess.Popen(
        [*command, "--url", fake_server.url, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores SIGINT, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal, deadline = tmp_path / "out/predictions.jsonl", time.monotonic() + 60
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"run the same command again" in errors
        assert b"Traceback" not in errors
    finished = journal.read_bytes().count(b"\n")
    assert 2 <= finished < 6
    fake_server.behave, before = slow(0), len(fake_server.sent)
    assert predict(radiographs) == 0
    assert len(fake_server.sent) - before == 6 - finished


def test_bad_inputs_are_one_line_each_and_the_others_are_predicted(predict, radiographs, fake_server, tmp_path):
    folder = radiographs / "bad"
    folder.mkdir()
    good = next(radiographs.rglob("*.png"))
    (folder / "empty.png").touch()
    (folder / "truncated.png").write_bytes(good.read_bytes()[:-30])
    (folder / "text.jpg").write_text("not an image")
    (folder / "bomb.pgm").write_bytes(b"P5 60000 60000 255\n")
    (folder / "zero.dcm").write_bytes(bytes(400))
    Image.new("L", (1, 1)).save(folder / "dot.png")
    Image.new("L", (1, 4000)).save(folder / "line.png")
    shutil.copy(good, folder / "zz_copy.png")
    (folder / "[bold]odd\nname.png").touch()
    missing = tmp_path / "missing.png"
    assert predict(radiographs, missing, good) == 1
    assert len(fake_server.sent) == 6
    records = read_predictions(tmp_path / "out/predictions.jsonl")
    assert sum(record.status == "ok" for record in records.values()) == 6
    reasons = {os.path.basename(name): record.reason for name, record in records.items() if record.status == "rejected"}
    assert len(reasons) == 10
    for name, word in {
        "empty.png": "empty",
        "truncated.png": "truncated",
        "text.jpg": "not an image",
        "bomb.pgm": "too large",
        "zero.dcm": "zero",
        "dot.png": "too small",
        "line.png": "too small",
        "zz_copy.png": f"the same content as {good}",
        "missing.png": "does not exist",
    }.items():
        assert word in reasons[name], reasons[name]
        assert sum(f"{name}: {reasons[name]}" in line for line in predict.err.splitlines()) == 1
    assert f"{good}: the same file as {good}, given twice" in predict.err
    assert "[bold]odd\N{REPLACEMENT CHARACTER}name.png: empty" in predict.err


def test_files_that_are_no_images_are_counted(predict, radiographs):
    for name in ("notes.txt", "more.TXT", "1.2.840.7"):
        (radiographs / name).write_text("no radiograph")
    assert predict(radiographs) == 0
    assert "skipped 3 files in the folders, no images: 2 .txt, 1 without a suffix" in predict.err


def test_copies_count_once_in_their_study(predict, radiographs, tmp_path):
    study = radiographs / "XR_WRIST/patient00001/study1_positive"
    shutil.copy(study / "image1.png", study / "image3.png")
    other = radiographs / "XR_WRIST/patient00003/study1_negative"
    other.mkdir(parents=True)
    shutil.copy(study / "image1.png", other / "image1.png")
    assert predict(radiographs) == 1
    found = {record["study"]: record for record in lines(tmp_path / "out/studies.jsonl")}
    assert len(found["XR_WRIST/patient00001/study1_positive"]["images"]) == 2
    assert found["XR_WRIST/patient00003/study1_negative"]["images"] == [str(study / "image1.png")]


def test_server_error_is_tried_once_more_alone(predict, radiographs, fake_server, refusal, tmp_path):
    path = next(radiographs.rglob("*.png"))
    fake_server.behave = refusal(grpc.StatusCode.INTERNAL, "the batch failed", of=path.read_bytes(), attempts=1)
    assert predict(radiographs) == 0
    assert len(fake_server.sent) == 7
    again = max(place for place, sent in enumerate(fake_server.sent) if sent == path.read_bytes())
    assert fake_server.alone[again]
    assert len(lines(tmp_path / "out/predictions.jsonl")) == 6


def test_image_that_fails_twice_is_tried_again_by_the_next_run(predict, radiographs, fake_server, refusal):
    path = next(radiographs.rglob("*.png"))
    fake_server.behave = refusal(grpc.StatusCode.INTERNAL, "engine lost", of=path.read_bytes(), attempts=2)
    assert predict(radiographs) == 1
    assert f"failed {path}: server error INTERNAL: engine lost (tried twice, the second time alone)" in predict.err
    assert predict(radiographs) == 0
    assert len(fake_server.sent) == 8


def test_image_that_the_server_refuses_is_not_sent_twice(predict, radiographs, fake_server, refusal):
    path = next(radiographs.rglob("*.png"))
    message = "in ensemble 'msfm', unscaled 12-bit data"  # Triton puts the ensemble before a stage's reason
    fake_server.behave = refusal(grpc.StatusCode.INVALID_ARGUMENT, message, of=path.read_bytes())
    assert predict(radiographs) == 1
    assert len(fake_server.sent) == 6
    assert f"rejected {path}: refused by the server: unscaled 12-bit data" in predict.err


def test_server_that_goes_away_keeps_what_was_finished(predict, radiographs, fake_server, slow, tmp_path):
    def stop_after_three(encoded, attempt):
        if len(fake_server.sent) > 3:
            fake_server.stop()
            slow(1.0)(encoded, attempt)

    fake_server.behave = stop_after_three
    assert predict(radiographs, "--concurrency", "1", "--timeout-s", "2") == 2
    assert "no server is left" in predict.err
    assert "run the same command again" in predict.err
    assert [record["status"] for record in lines(tmp_path / "out/predictions.jsonl")] == ["ok"] * 3


def test_usage_errors_exit_2_and_say_what_to_do(predict, radiographs, tmp_path):
    for arguments, word in (
        ([], "nothing to predict"),
        ([radiographs, "--threshold", "2"], "--threshold"),
        ([radiographs, "--concurrency", "0"], "--concurrency"),
        ([radiographs, "--split", "test"], "--split"),
        (["--index", tmp_path / "nowhere"], "--index"),
        ([tmp_path / "out"], "one of the inputs"),
        ([radiographs, "--timeout-s", "inf"], "--timeout-s"),
        ([radiographs, "--unstable-margin", "-1"], "--unstable-margin"),
        ([radiographs, "--model-version", "newest"], "--model-version: expected a number"),
    ):
        assert predict(*arguments) == 2
        assert word in predict.err
    for url in ("", "nowhere", "http://127.0.0.1:8001/"):
        assert main([str(radiographs), "--url", url, "--out", str(tmp_path / "out")]) == 2
    (tmp_path / "out").touch()
    assert predict(radiographs) == 2
    assert "out is a file" in predict.err
    assert main([str(radiographs), "--out", str(tmp_path / "out/deeper")]) == 2
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.jsonl").write_text('{"something": "else"}\n')
    assert predict(radiographs) == 2
    assert "line 1 is not a prediction" in predict.err


def test_index_gives_images_studies_and_splits(predict, radiographs, fake_server, tmp_path):
    paths = sorted(radiographs.rglob("*.png"))
    rows = [
        Radiograph(
            str(path.relative_to(radiographs)),
            f"p{i // 3}",
            "s1",
            "",
            "wrist",
            0,
            None,
            53,
            61,
            "test" if i else "train",
        )
        for i, path in enumerate(paths)
    ]
    write_index(Index(radiographs, tuple(rows)))
    assert predict("--index", radiographs, "--split", "test") == 0
    assert len(fake_server.sent) == 5
    assert {record["study"] for record in lines(tmp_path / "out/studies.jsonl")} == {"wrist/p0/s1", "wrist/p1/s1"}


@pytest.mark.parametrize("phantoms", ["", "1.0.0"])
def test_report_and_summary_tell_what_the_weights_know(predict, radiographs, fake_server, tmp_path, phantoms):
    fake_server.phantoms = phantoms
    predict(radiographs, report=True)
    report = (tmp_path / "out/report.html").read_text()
    assert ("Trained on synthetic phantoms." in report) == ("never on a patient" in predict.out) == bool(phantoms)
    assert "not a medical device" in predict.out


def test_artefacts_that_failed_their_gate_say_so(predict, radiographs, fake_server, tmp_path):
    fake_server.accepted = "NOT AS EAGER fp32: accepted as 'a <trial>'"
    predict(radiographs, report=True)
    assert "accepted as 'a <trial>'" in " ".join(predict.out.split())
    assert "Not what was trained." in (report := (tmp_path / "out/report.html").read_text())
    assert "a &lt;trial&gt;" in report


def test_overlays_and_report_are_not_taken_for_inputs(predict, radiographs, fake_server, tmp_path):
    for _ in range(2):
        assert predict(tmp_path, "--overlays", report=True) == 0
    assert len(fake_server.sent) == 6
    assert len(list((tmp_path / "out/overlays").glob("*.png"))) == 6

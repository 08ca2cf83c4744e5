"""One small run of everything: untrained model, eager, engines in process, the real server."""

import pytest

from scaphoid.bench.comparison import Comparison, compare
from scaphoid.bench.flow import StageTime, timed, untrained_weights


def test_stage_times_add_up_over_calls():
    times = {"double": StageTime()}
    stages = timed({"double": lambda image, other: [2 * value for value in image]}, times)
    assert stages["double"]([1, 2], None) == [2, 4]
    stages["double"]([3], None)
    assert times["double"].images == 3
    assert times["double"].seconds > 0
    times["double"].reset()
    assert times["double"] == StageTime()


def test_an_unknown_flow_is_named_before_anything_is_built(tmp_path):
    with pytest.raises(ValueError, match="unknown flow 'mfsm': expected one of msfm"):
        untrained_weights(tmp_path / "x.safetensors", "mfsm", "resnet18")


@pytest.mark.slow
def test_one_command_measures_eager_engines_and_the_real_server(tmp_path):
    import torch

    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.msfm import Msfm, MsfmConfig

    torch.manual_seed(0)
    weights = tmp_path / "tiny.safetensors"
    save_model(weights, Msfm(MsfmConfig(backbone="resnet18", image_size=160, part_size=96)))
    arguments = Comparison(weights=weights, clients=3, batches=(1, 3), seconds=1.5, rounds=1, out=tmp_path / "out")
    report = compare(arguments)
    throughput, rounds, stages, *_ = (table.records() for table in report.tables)
    assert [row["batch (images)"] for row in throughput] == [1, 4, 1, 3, throughput[4]["batch (images)"], *[None] * 3]
    assert all(row["rate (images/s)"] > 0 and row["p99 (ms)"] >= row["p50 (ms)"] > 0 for row in throughput)
    assert [row["failed (requests)"] for row in rounds] == [0] * 4  # in process, and three ways to ask the server
    by_stage = {row["stage"]: row for row in stages}
    assert set(by_stage) == {
        *("preprocess", "encoder", "object_crop", "part_crops", "parts_encoder"),
        *("main_result", "result", "parts_result"),
    }
    assert all(row["Triton (ms an image)"] > 0 and row["Triton batch (images)"] >= 1 for row in stages)
    assert report.subject["arithmetic (GFLOP an image)"] > 1

import shutil

import pytest
from google.protobuf import text_format

from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import CONFIGS
from scaphoid.triton_repo.configs import CONFIG, TARGETS, ConfigError, check, read

NAMES = {"cpu": sorted({*STAGES, *FLOWS}), "gpu": sorted({*STAGES, *FLOWS, "guard"})}
CPU = CONFIGS["cpu"]


@pytest.mark.parametrize("target", TARGETS)
def test_there_is_one_config_for_every_stage_and_flow(target):
    assert sorted(path.parent.name for path in CONFIGS[target].glob(f"*/{CONFIG}")) == NAMES[target]


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in TARGETS for name in NAMES[target]])
def test_config_agrees_with_contracts_and_flows(target, name):
    check(CONFIGS[target] / name / CONFIG, target)


def test_a_guard_is_on_a_gpu_alone():
    with pytest.raises(ConfigError, match="no stage and no flow is called guard"):
        check(CONFIGS["gpu"] / "guard" / CONFIG, "cpu")


def test_an_encoder_is_another_on_a_gpu():
    with pytest.raises(ConfigError, match=r"backend and platform: expected \('openvino', ''\), got \('tensorrt'"):
        check(CONFIGS["gpu"] / "encoder" / CONFIG, "cpu")


@pytest.mark.parametrize("target", TARGETS)
def test_main_and_object_step_share_one_model(target):
    steps = read(CONFIGS[target] / "msfm" / CONFIG).ensemble_scheduling.step
    assert [step.model_name for step in steps].count("encoder") == 2


def swap_outputs(config):
    first, second = config.output[1], config.output[2]
    first.name, second.name = second.name, first.name


def swap_wires(config):
    step = config.ensemble_scheduling.step[1]  # the main encoder: its two maps look alike
    activation, class_activation = step.output_map["activation"], step.output_map["class_activation"]
    step.output_map["activation"], step.output_map["class_activation"] = class_activation, activation


def unpin(config):
    config.ensemble_scheduling.step[0].model_version = -1


def retype(config):
    config.input[0].data_type = 11  # TYPE_FP32


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("encoder", swap_outputs, "output names, in order"),
        ("object_crop", retype, "data_type of input image"),
        ("msfm", swap_wires, "output_map of step main"),
        ("kalm", unpin, "pins no version"),
    ],
)
def test_a_config_that_disagrees_is_caught(tmp_path, name, damage, told):
    shutil.copytree(CPU / name, tmp_path / name)
    config = read(tmp_path / name / CONFIG)
    damage(config)
    (tmp_path / name / CONFIG).write_text(text_format.MessageToString(config))
    with pytest.raises(ConfigError, match=told):
        check(tmp_path / name / CONFIG)


def test_a_file_that_is_not_protobuf_text_is_named(tmp_path):
    (tmp_path / CONFIG).write_text("name = encoder")
    with pytest.raises(ConfigError, match=CONFIG):
        read(tmp_path / CONFIG)

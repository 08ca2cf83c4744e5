"""Every rule that a repository keeps, and that it finds a configuration that breaks it."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo import rules
from scaphoid.triton_repo.assemble import CONFIGS
from scaphoid.triton_repo.configs import CONFIG, ENSEMBLES, FIRST, GUARDED, TARGETS, ConfigError, guarded, read
from scaphoid.triton_repo.rules import RULES, check_repository


def test_both_repositories_keep_every_rule():
    assert CONFIGS.keys() == TARGETS.keys() == RULES.keys()
    for target, folder in CONFIGS.items():
        guard = {"guard"} if target == "gpu" else set()
        assert check_repository(folder, target).keys() == {*STAGES, *FLOWS} | guard


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_both_repositories_have_the_same_ensembles_behind_the_guard(flow):
    cpu, gpu = (read(CONFIGS[target] / flow / CONFIG) for target in ("cpu", "gpu"))
    gpu.ClearField("response_cache")  # which it turns off by name
    guard = gpu.ensemble_scheduling.step.pop(0)
    assert (guard.model_name, dict(guard.input_map)) == ("guard", {"encoded": "encoded"})
    for step in gpu.ensemble_scheduling.step:
        assert "encoded" not in step.input_map.values()  # nothing gets it but the guard
        for name, wire in step.input_map.items():
            if wire == guard.output_map["encoded"]:
                step.input_map[name] = "encoded"
    assert cpu == gpu


def test_the_guard_stands_before_everything_that_takes_an_encoded_image():
    assert FIRST == {"cpu": "preprocess", "gpu": "guard"}
    for flow in FLOWS.values():
        first, *others = guarded(flow).steps
        assert (first.stage.name, [*first.outputs.values()]) == ("guard", [GUARDED])
        assert [step.name for step in others] == [step.name for step in flow.steps]
        assert not any("encoded" in step.inputs.values() for step in others)
        assert flow.steps[0].inputs == {"encoded": "encoded"}  # the table itself is as it was


def test_the_autoscaler_divides_by_a_step_that_every_image_takes_once():
    """On a GPU too, where it is not the first."""
    rules = yaml.safe_load((CONFIGS["gpu"].parent / "deploy/helm/files/prometheus-adapter.yaml").read_text())["rules"]
    for query in (rules["custom"][0]["seriesQuery"], rules["custom"][0]["metricsQuery"]):
        (counted,) = re.findall(r'model="(\w+)"', query)
        for flows in ENSEMBLES.values():
            assert all([step.stage.name for step in flow.steps].count(counted) == 1 for flow in flows.values())


def step_of(config: ModelConfig, model: str):
    """The first step of an ensemble that runs `model`."""
    return next(step for step in config.ensemble_scheduling.step if step.model_name == model)


def policy(config: ModelConfig, level: int):
    return config.dynamic_batching.priority_queue_policy[level]


def clear(*fields: str):
    return lambda config: [config.ClearField(field) for field in fields]


# target, model, damage, what the error says, the rule that finds it
BREAKS = [
    (
        "gpu",
        "encoder",
        lambda c: setattr(c.instance_group[0], "kind", ModelInstanceGroup.KIND_GPU),
        "kind",
        "names_no_kind",
    ),
    ("cpu", "result", lambda c: c.instance_group[0].gpus.append(0), "gpus", "names_no_kind"),
    ("gpu", "guard", lambda c: c.instance_group[0].ClearField("kind"), "expected 2, got 0", "names_no_kind"),
    ("gpu", "msfm", lambda c: setattr(c, "max_batch_size", 8), "expected 1, got 8", "takes_one_image"),
    (
        "gpu",
        "preprocess",
        lambda c: setattr(c.input[0], "allow_ragged_batch", False),
        "allow_ragged_batch of encoded",
        "batches",
    ),
    ("gpu", "kalm", lambda c: setattr(c.input[0], "allow_ragged_batch", False), "allow_ragged_batch", "batches"),
    ("cpu", "encoder", clear("dynamic_batching"), "dynamic_batching given", "batches"),
    (
        "cpu",
        "encoder",
        lambda c: setattr(c.dynamic_batching.default_queue_policy, "max_queue_size", 9),
        "queue limited: expected False",
        "limits_preprocess_alone",
    ),
    (
        "gpu",
        "result",
        lambda c: setattr(c.dynamic_batching.default_queue_policy, "default_timeout_microseconds", 9),
        "time-out, at most 30 s: expected False",
        "limits_the_guard_alone",
    ),
    (
        "cpu",
        "preprocess",
        lambda c: c.dynamic_batching.ClearField("default_queue_policy"),
        "queue limited: expected True",
        "limits_preprocess_alone",
    ),
    (
        "gpu",
        "preprocess",
        lambda c: setattr(c.dynamic_batching.default_queue_policy, "max_queue_size", 32),
        "queue limited: expected False",
        "limits_the_guard_alone",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(policy(c, 2), "max_queue_size", 0),
        "queue limited: expected True",
        "limits_the_guard_alone",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(policy(c, 1), "default_timeout_microseconds", 10**9),
        "time-out",
        "limits_the_guard_alone",
    ),
    (
        "gpu",
        "preprocess",
        lambda c: setattr(policy(c, 2), "max_queue_size", 32),  # on one level alone
        "queue limited: expected False",
        "limits_the_guard_alone",
    ),
    (
        "gpu",
        "encoder",
        lambda c: setattr(policy(c, 2), "default_timeout_microseconds", 10**9),
        "time-out, at most 30 s: expected False",
        "limits_the_guard_alone",
    ),
    (
        "cpu",
        "encoder",
        lambda c: setattr(policy(c, 2), "max_queue_size", 32),
        "queue limited: expected False",
        "limits_preprocess_alone",
    ),
    (
        "gpu",
        "guard",
        lambda c: c.dynamic_batching.priority_queue_policy.pop(2),  # that level falls back on no limit
        "queue limited: expected True",
        "limits_the_guard_alone",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(policy(c, 2), "timeout_action", ModelQueuePolicy.DELAY),
        "timeout_action: expected 0, got 1",
        "limits_the_guard_alone",
    ),
    (
        "cpu",
        "preprocess",
        lambda c: setattr(c.dynamic_batching.default_queue_policy, "timeout_action", ModelQueuePolicy.DELAY),
        "timeout_action: expected 0, got 1",
        "limits_preprocess_alone",
    ),
    (
        "gpu",
        "preprocess",
        lambda c: setattr(c.dynamic_batching, "max_queue_delay_microseconds", 10**7),
        "max_queue_delay_microseconds: expected 0, got 10000000",
        "batches",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(c.instance_group[0], "count", 0),
        r"1 or more in each, got \[0\]",
        "has_instances",
    ),
    ("cpu", "encoder", clear("instance_group"), r"1 or more in each, got \[\]", "has_instances"),
    (
        "gpu",
        "guard",
        lambda c: setattr(c.model_transaction_policy, "decoupled", True),
        "decoupled: expected False",
        "answers_once",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(c.parameters["EXECUTION_ENV_PATH"], "string_value", "env.tar.gz"),
        "EXECUTION_ENV_PATH",
        "loads_what_was_assembled",
    ),
    (
        "gpu",
        "encoder",
        lambda c: c.model_operations.op_library_filename.append("plugin.so"),
        "model_operations",
        "loads_what_was_assembled",
    ),
    (
        "cpu",
        "result",
        lambda c: setattr(c, "default_model_filename", "other.pt"),
        "default_model_filename",
        "loads_what_was_assembled",
    ),
    (
        "gpu",
        "kalm",
        lambda c: c.model_repository_agents.agents.add(name="other"),
        "model_repository_agents",
        "loads_what_was_assembled",
    ),
    (
        "gpu",
        "msfm",
        lambda c: setattr(step_of(c, "preprocess"), "model_version", 2),
        r"expected one, got \[1, 2\]",
        "pins_one_version",
    ),
    ("gpu", "object_crop", clear("parameters"), "DISABLE_OPTIMIZED_EXECUTION", "runs_glue_plainly"),
    ("gpu", "kalm", lambda c: setattr(c.response_cache, "enable", True), "response_cache", "caches_no_response"),
    ("cpu", "kalm", lambda c: c.model_warmup.add(name="x"), "model_warmup: expected 0", "warms_no_ensemble"),
    ("gpu", "suppress", clear("model_warmup"), "largest batch_size of model_warmup", "warms_every_member"),
    (
        "gpu",
        "result",
        lambda c: c.model_warmup[0].inputs.pop("part_boxes"),
        "inputs of model_warmup full",
        "warms_every_member",
    ),
    (
        "gpu",
        "encoder",
        lambda c: setattr(c.model_warmup[1].inputs["image"], "data_type", DataType.TYPE_FP32),
        "data_type of image in model_warmup full",
        "warms_every_member",
    ),
    (
        "gpu",
        "encoder",
        lambda c: setattr(c.model_warmup[0].inputs["image"], "random_data", True),
        "input_data_file of image",
        "warms_every_member",
    ),
    (
        "gpu",
        "encoder",
        lambda c: setattr(c.dynamic_batching, "priority_levels", 0),
        "priority_levels",
        "ranks_requests",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(c.dynamic_batching, "default_priority_level", 2),
        "default_priority_level",
        "ranks_requests",
    ),
    (
        "gpu",
        "guard",
        lambda c: setattr(policy(c, 2), "allow_timeout_override", False),
        "allow_timeout_override",
        "ranks_requests",
    ),
    ("gpu", "parts_encoder", lambda c: c.instance_group[0].profile.pop(), "profile", "fits_the_engine"),
    ("gpu", "encoder", lambda c: setattr(c.optimization.cuda, "graphs", False), "CUDA graphs", "fits_the_engine"),
    (
        "gpu",
        "encoder",
        lambda c: setattr(c.optimization.cuda.graph_spec[3], "batch_size", 16),
        "batch sizes of graph_spec",
        "fits_the_engine",
    ),
    (
        "gpu",
        "encoder",
        lambda c: c.optimization.cuda.graph_spec[0].input["image"].dim.pop(),
        "shapes of graph_spec",
        "fits_the_engine",
    ),
    (
        "gpu",
        "encoder",
        lambda c: setattr(c.optimization.cuda.graph_spec[2].graph_lower_bound, "batch_size", 3),
        "graph_lower_bound",
        "fits_the_engine",
    ),
]


@pytest.mark.parametrize(("target", "model", "damage", "told", "rule"), BREAKS)
def test_a_broken_rule_is_found(tmp_path, target, model, damage, told, rule):
    path = tmp_path / model / CONFIG
    config = write_damaged(CONFIGS[target] / model / CONFIG, damage, path)
    with pytest.raises(ConfigError, match=told) as error:
        getattr(rules, rule)(path, config)
    assert str(path) in str(error.value)
    assert getattr(rules, rule) in RULES[target]


def test_every_rule_is_tested():
    assert {rule.__name__ for rules in RULES.values() for rule in rules} == {case[-1] for case in BREAKS}


def write_damaged(source: Path, damage, path: Path) -> ModelConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    config = read(source)
    damage(config)
    path.write_text(text_format.MessageToString(config))
    return read(path)


def reverse_outputs(config: ModelConfig) -> None:
    outputs = [*config.output][::-1]
    del config.output[:]
    config.output.extend(outputs)


def swap_maps(config: ModelConfig) -> None:
    wires = step_of(config, "encoder").output_map  # of the main stage
    wires["activation"], wires["class_activation"] = wires["class_activation"], wires["activation"]


def retype(config: ModelConfig) -> None:
    config.input[0].data_type = DataType.TYPE_FP32


# model, damage, what the check of the whole repository says
MISTAKES = {
    "wrong dtype": ("object_crop", retype, "data_type of input image: expected TYPE_UINT8, got TYPE_FP32"),
    "wrong dtype in a warm-up": (
        "encoder",
        lambda c: setattr(c.model_warmup[0].inputs["image"], "data_type", DataType.TYPE_INT32),
        "data_type of image in model_warmup one",
    ),
    "missing input": ("part_crops", lambda c: c.input.pop(), "input names, in order"),
    "missing output": ("encoder", lambda c: c.output.pop(), "output names, in order"),
    "missing wire": (
        "msfm",
        lambda c: step_of(c, "object_crop").output_map.pop("object_margin"),
        "output_map of step object_crop",
    ),
    "missing step": ("kalm", lambda c: c.ensemble_scheduling.step.pop(), r"number of steps: expected \d+, got \d+"),
    "missing model": ("suppress", None, "suppress.*No such file"),
    "swapped maps": ("msfm", swap_maps, "output_map of step main"),
    "permuted outputs of an engine": ("encoder", reverse_outputs, "output names, in order"),
    "permuted outputs of glue": ("result", reverse_outputs, "output names, in order"),
    "wrong dims": ("parts_result", lambda c: c.input[2].dims.__setitem__(0, 6), "dims of input parts_logits"),
    "wrong size for its neighbours": (
        "preprocess",
        lambda c: c.output[0].dims.__setitem__(1, 160),
        r"encoder/config.pbtxt: dims of input image, as msfm's image: expected \[1, 160, -1\], got \[1, -1, -1\]",
    ),
    "wrong model": (
        "kalm",
        lambda c: setattr(step_of(c, "global_encoder"), "model_name", "encoder"),
        "model of step global: expected global_encoder, got encoder",
    ),
    "wrong backend": ("encoder", lambda c: setattr(c, "backend", "openvino"), "backend and platform"),
    "no guard": ("kalm", lambda c: c.ensemble_scheduling.step.pop(0), "number of steps"),
    "past the guard": (
        "msfm_fma",
        lambda c: step_of(c, "preprocess").input_map.update({"encoded": "encoded"}),
        "input_map of step preprocess: expected {'encoded': 'guarded'}, got {'encoded': 'encoded'}",
    ),
    "a guard that is fed by itself": (
        "msfm",
        lambda c: step_of(c, "guard").input_map.update({"encoded": "guarded"}),
        "input_map of step guard",
    ),
    "a guard of another backend": ("guard", lambda c: setattr(c, "backend", "dali"), "backend and platform"),
    "wrong dtype of the guard": (
        "guard",
        lambda c: setattr(c.output[0], "data_type", DataType.TYPE_INT8),
        "data_type of output encoded: expected TYPE_UINT8, got TYPE_INT8",
    ),
    "wrong dims of the guard": (
        "guard",
        lambda c: c.output[0].dims.append(-1),
        "dims of output encoded",
    ),
    "a Python backend": ("suppress", lambda c: setattr(c, "backend", "python"), "backend and platform"),
    "no version": (
        "msfm_fma",
        lambda c: setattr(c.ensemble_scheduling.step[0], "model_version", -1),
        "pins no version",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_repository_is_found(tmp_path, name):
    model, damage, told = MISTAKES[name]
    shutil.copytree(CONFIGS["gpu"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / model / CONFIG
    if damage is None:
        path.unlink()
    else:
        write_damaged(path, damage, path)
    with pytest.raises(ConfigError, match=told):
        check_repository(tmp_path, "gpu")

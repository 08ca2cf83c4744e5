"""What a repository has to keep beside the contracts and the wiring, a function for each rule; configs.py checks those.

Why each rule holds is told where it is kept, in the `config.pbtxt` files and in gpu/README.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy
from tritonclient.utils import triton_to_np_dtype

from scaphoid.export.artefacts import WARMUP
from scaphoid.export.tensorrt_engines.build_engines import BATCHES
from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.flows import FLOWS, Flow
from scaphoid.triton_repo.configs import (
    CONFIG,
    ENSEMBLES,
    FIRST,
    MODELS,
    TARGETS,
    ConfigError,
    check,
    expect,
    read,
)
from scaphoid.triton_repo.memory import BOUNDED, SERVER_FLAGS, server_flags, step_limit

INTERACTIVE, BATCH = 1, 2  # priority of a request: a person waits for it, or a program
LONGEST_WAIT_S = 30  # in the first step's queue
ELSEWHERE = {
    "runtime", "default_model_filename", "cc_model_filenames", "model_operations", "model_repository_agents",
    "EXECUTION_ENV_PATH",  # a parameter: the Python environment
}  # fmt: skip

Rule = Callable[[Path, ModelConfig], None]


def kind_of(config: ModelConfig) -> str:
    """Of a model's stage; empty for an ensemble."""
    stage = MODELS["gpu"].get(config.name)  # all there are: a CPU has no other ones
    return stage.kind if stage else ""


def names_no_kind(path: Path, config: ModelConfig) -> None:
    """KIND_GPU refuses to load without a GPU, and KIND_CPU keeps a model from the GPU that is there: right for the
    guard alone, which has no use for it."""
    expected = ModelInstanceGroup.KIND_CPU if kind_of(config) == "guard" else ModelInstanceGroup.KIND_AUTO
    for group in config.instance_group:
        expect(path, "kind of an instance_group", group.kind, expected)
        expect(path, "gpus of an instance_group", list(group.gpus), [])


def has_instances(path: Path, config: ModelConfig) -> None:
    """In numbers: what the server puts in the place of none is not what the limits are computed from."""
    counts = [group.count for group in config.instance_group]
    if kind_of(config) and min(counts, default=0) < 1:
        raise ConfigError(f"{path}: counts of instance_group: expected 1 or more in each, got {counts}")


def answers_once(path: Path, config: ModelConfig) -> None:
    """A decoupled model may answer a request never, or several times."""
    expect(path, "decoupled", config.model_transaction_policy.decoupled, False)


def loads_what_was_assembled(path: Path, config: ModelConfig) -> None:
    """No code and no file but the model's own, which the manifest vouches for."""
    given = {field.name for field, _ in config.ListFields()} | {*config.parameters}
    expect(path, "fields that load something else", sorted(given & ELSEWHERE), [])


def pins_one_version(path: Path, config: ModelConfig) -> None:
    """All steps are of the version that the flow is of: weights of two would answer together."""
    versions = sorted({step.model_version for step in config.ensemble_scheduling.step})
    if len(versions) > 1:
        raise ConfigError(f"{path}: versions that steps pin: expected one, got {versions}")


def takes_one_image(path: Path, config: ModelConfig) -> None:
    """A request of several images fails as a whole for one of them."""
    if config.name in FLOWS:
        expect(path, "max_batch_size", config.max_batch_size, 1)


def batches(path: Path, config: ModelConfig) -> None:
    """Requests batch, and encoded images whatever their length. None waits for others to come: a batch forms while the
    one before it runs."""
    if kind_of(config):
        expect(path, "dynamic_batching given", config.HasField("dynamic_batching"), True)
    expect(path, "max_queue_delay_microseconds", config.dynamic_batching.max_queue_delay_microseconds, 0)
    for tensor in config.input:
        expect(path, f"allow_ragged_batch of {tensor.name}", tensor.allow_ragged_batch, tensor.name == ENCODED.name)


def limits_the_guard_alone(path: Path, config: ModelConfig) -> None:
    """What is rejected later wastes the work done before."""
    _limits_alone(FIRST["gpu"], path, config)


def limits_preprocess_alone(path: Path, config: ModelConfig) -> None:
    """Likewise, where the guard is inside of it."""
    _limits_alone(FIRST["cpu"], path, config)


def _limits_alone(name: str, path: Path, config: ModelConfig) -> None:
    if not kind_of(config):
        return
    batching = config.dynamic_batching
    default, own = batching.default_queue_policy, dict(batching.priority_queue_policy)
    first = config.name == name
    policies = [own.get(level, default) for level in range(1, batching.priority_levels + 1)] or [default]
    for policy in policies if first else (default, *own.values()):
        expect(path, "queue limited", policy.max_queue_size > 0, first)
        wait = policy.default_timeout_microseconds
        limited = 0 < wait <= LONGEST_WAIT_S * 1_000_000 if first else wait > 0
        expect(path, f"time-out, at most {LONGEST_WAIT_S} s", limited, first)
        expect(path, "timeout_action", policy.timeout_action, ModelQueuePolicy.REJECT)  # late is answered, not put off


def runs_glue_plainly(path: Path, config: ModelConfig) -> None:
    """TorchScript's profiling executor compiles anew during its first runs."""
    if kind_of(config) == "glue":
        found = config.parameters["DISABLE_OPTIMIZED_EXECUTION"].string_value
        expect(path, "DISABLE_OPTIMIZED_EXECUTION", found, "true")


def caches_no_response(path: Path, config: ModelConfig) -> None:
    """No radiograph comes twice, and none is kept."""
    expect(path, "response_cache", config.response_cache.enable, False)


def warms_no_ensemble(path: Path, config: ModelConfig) -> None:
    """Triton refuses to load one that does."""
    if config.name in FLOWS:
        expect(path, "number of model_warmup", len(config.model_warmup), 0)


def warms_every_member(path: Path, config: ModelConfig) -> None:
    """From a sample of every input; the largest batch is among them, for it needs the most memory."""
    if not kind_of(config):
        return
    sizes = [warmup.batch_size for warmup in config.model_warmup]
    expect(path, "largest batch_size of model_warmup", max(sizes, default=0), config.max_batch_size)
    for warmup in config.model_warmup:
        where = f"model_warmup {warmup.name}"
        expect(path, f"inputs of {where}", sorted(warmup.inputs), sorted(tensor.name for tensor in config.input))
        for tensor in config.input:
            sample = warmup.inputs[tensor.name]
            expect(path, f"data_type of {tensor.name} in {where}", sample.data_type, tensor.data_type)
            if tensor.name != ENCODED.name:
                expect(path, f"dims of {tensor.name} in {where}", list(sample.dims), list(tensor.dims))
            expect(path, f"input_data_file of {tensor.name} in {where}", sample.input_data_file, tensor.name)


def ranks_requests(path: Path, config: ModelConfig) -> None:
    """In every queue, for the long one is not the first step's. A request that names no priority is interactive."""
    if kind_of(config):
        batching = config.dynamic_batching
        expect(path, "priority_levels", batching.priority_levels, BATCH)
        expect(path, "default_priority_level", batching.default_priority_level, INTERACTIVE)
        if config.name == FIRST["gpu"]:
            policies = batching.priority_queue_policy
            expect(path, "levels of priority_queue_policy", sorted(policies), [INTERACTIVE, BATCH])
            expect(path, "allow_timeout_override", {p.allow_timeout_override for p in policies.values()}, {True})


def fits_the_engine(path: Path, config: ModelConfig) -> None:
    """The engine's only profile, its largest batch, and CUDA graphs inside both."""
    if kind_of(config) != "encoder":
        return
    expect(path, "max_batch_size", config.max_batch_size, BATCHES[-1])
    expect(path, "profile", [list(group.profile) for group in config.instance_group], [["0"]])
    graphs = config.optimization.cuda
    expect(path, "CUDA graphs", graphs.graphs, True)
    sizes = [spec.batch_size for spec in graphs.graph_spec]
    inside = {*BATCHES} <= {*sizes} <= {*range(1, BATCHES[-1] + 1)} and len({*sizes}) == len(sizes)
    if not inside:
        raise ConfigError(f"{path}: batch sizes of graph_spec: expected each once, {list(BATCHES)} among them: {sizes}")
    for spec in graphs.graph_spec:
        shapes = {name: list(shape.dim) for name, shape in spec.input.items()}
        expect(path, "shapes of graph_spec", shapes, {tensor.name: list(tensor.dims) for tensor in config.input})
        expect(path, "graph_lower_bound given", spec.HasField("graph_lower_bound"), False)


EVERYWHERE: tuple[Rule, ...] = (
    names_no_kind,
    has_instances,
    answers_once,
    loads_what_was_assembled,
    pins_one_version,
    takes_one_image,
    batches,
    runs_glue_plainly,
    caches_no_response,
    warms_no_ensemble,
)
RULES = {
    "cpu": (*EVERYWHERE, limits_preprocess_alone),
    "gpu": (*EVERYWHERE, limits_the_guard_alone, warms_every_member, ranks_requests, fits_the_engine),
}


def check_repository(folder: Path, target: str, flows: Iterable[str] = tuple(FLOWS)) -> dict[str, ModelConfig]:
    """The configurations of `flows` and all their models, by name, after each was held against the contracts, the flow
    table and the rules for `target`. Raises ConfigError for the first that disagrees."""
    ensembles = [ENSEMBLES[target][flow] for flow in flows]
    names = dict.fromkeys(name for flow in ensembles for name in (*flow.stages, flow.name))
    configs = {name: check(folder / name / CONFIG, target) for name in names}
    for name, config in configs.items():
        for rule in RULES[target]:
            rule(folder / name / CONFIG, config)
    for flow in ensembles:
        fits_together(folder, flow, configs)
    return configs


def fits_together(folder: Path, flow: Flow, configs: Mapping[str, ModelConfig]) -> None:
    """Every step takes its tensors in the size in which another gives them."""
    given = {tensor.name: list(tensor.dims) for tensor in configs[flow.name].input}
    for step in flow.steps:
        path = folder / step.stage.name / CONFIG
        for tensor in configs[step.stage.name].input:
            name = step.inputs[tensor.name]
            expect(path, f"dims of input {tensor.name}, as {flow.name}'s {name}", list(tensor.dims), given[name])
        given |= {step.outputs[tensor.name]: list(tensor.dims) for tensor in configs[step.stage.name].output}


def check_assembled(repository: Path, manifest: Mapping) -> None:
    """An assembled repository, whose `manifest` says for which target: all of check_repository, and what only is there
    once artefacts are. Raises ConfigError."""
    target, flows = manifest["target"], manifest["flows"]
    if target not in TARGETS:
        raise ConfigError(f"{repository}: target {target}: expected one of {', '.join(TARGETS)}")
    configs = check_repository(repository, target, flows)
    for name, config in configs.items():
        path = repository / name / CONFIG
        for tensor in (*config.input, *config.output) if kind_of(config) else ():
            expect(path, f"open dims of {tensor.name}", -1 in tensor.dims, tensor.name == ENCODED.name)
        _warmup_files(path, config)
    if target == "gpu":
        first = configs[FIRST[target]]
        for flow in flows:
            _bounds(repository / flow / BOUNDED, configs[flow], step_limit(first))
        flags = (repository / SERVER_FLAGS).read_text().splitlines()
        expect(repository / SERVER_FLAGS, "flags", flags, server_flags(flows, manifest["stages"], first))


def _warmup_files(path: Path, config: ModelConfig) -> None:
    for warmup in config.model_warmup:
        for name, sample in warmup.inputs.items():
            file = path.parent / WARMUP / sample.input_data_file
            if not file.is_file():
                raise ConfigError(f"{path}: model_warmup {warmup.name}: expected the file {file}, it is missing")
            dtype = triton_to_np_dtype(DataType.Name(sample.data_type).removeprefix("TYPE_"))
            size = math.prod(sample.dims) * dtype().itemsize
            expect(file, f"bytes of {name}", file.stat().st_size, size)


def _bounds(path: Path, config: ModelConfig, limit: int) -> None:
    """The ensemble's second configuration, in the file `path`, is `config` with a limit, and nothing else."""
    expected = ModelConfig()
    expected.CopyFrom(config)
    expected.ensemble_scheduling.max_inflight_requests = limit
    if (found := read(path)) != expected:
        got = found.ensemble_scheduling.max_inflight_requests
        raise ConfigError(f"{path}: expected {CONFIG} with max_inflight_requests {limit}, got another one, with {got}")

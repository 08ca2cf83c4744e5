"""Where every tensor between two steps of a GPU ensemble lives, and how large Triton's CUDA pool has to be for them.

    python -m scaphoid.triton_repo.memory ARTEFACTS_OR_REPOSITORY

Triton's ensemble scheduler allocates a step's outputs in the memory that the step's backend asks for, on a GPU from one
pool that cannot grow (`--cuda-memory-pool-byte-size`, 64 MiB unless said). When it is full, tensors go through pinned
memory, with a line in the log for the first alone. So the pool is sized for all images that may be in flight, and these
are bounded: the first step by its queue, every later step by the ensembles' `max_inflight_requests`.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import triton_to_np_dtype

from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.trainer.contracts import ORIGINAL_SIZE
from scaphoid.trainer.flows import FLOWS, Flow, Step
from scaphoid.triton_repo.configs import CONFIG, FIRST, GUARD, GUARDED, ConfigError, guarded, read

BOUNDED = Path("configs") / "bounded.pbtxt"  # of an ensemble: its config.pbtxt with max_inflight_requests
SERVER_FLAGS = "server.flags"  # in the repository, a flag a line
GRANULARITY = 512  # bytes: CNMeM, the pool's allocator, rounds up to them
FRONT_END_THREADS = 16  # that may be about to enter the first step's queue at once
MIB = 2**20
HOST = {GUARDED: "the guard's process is on the host", ORIGINAL_SIZE.name: "DALI computes shapes on the CPU"}


@dataclass(frozen=True)
class Edge:
    """One tensor of a flow, of one image. `source` and `targets` are steps. `bytes` is None for an image's own file."""

    tensor: str
    source: str
    targets: tuple[str, ...]
    bytes: int | None
    on_gpu: bool


def edges(flow: Flow, stages: Mapping[str, Mapping]) -> list[Edge]:
    """Every tensor that a step of the GPU's ensemble hands on or answers with. `stages`: those of a manifest, which
    knows their sizes."""
    steps, found = guarded(flow).steps, []
    for step in steps:
        for name, size in _sizes(step, stages).items():
            targets = tuple(each.name for each in steps if name in each.inputs.values())
            targets += ("the answer",) if name in flow.outputs else ()
            if targets:
                found.append(Edge(name, step.name, targets, size, name not in HOST))
    return found


def _sizes(step: Step, stages: Mapping[str, Mapping]) -> dict[str, int | None]:
    """Bytes of each of a step's outputs, by the flow's names."""
    if step.stage is GUARD:  # no stage of the artefacts
        return {GUARDED: None}
    return {
        step.outputs[tensor["name"]]: math.prod(tensor["dims"]) * triton_to_np_dtype(tensor["dtype"])().itemsize
        for tensor in stages[step.stage.name]["outputs"]
    }


def bytes_per_image(flow: Flow, stages: Mapping[str, Mapping]) -> int:
    """Of the pool, if every tensor of an image were alive at once; they are not, Triton frees each after its last
    step."""
    return sum(-(-edge.bytes // GRANULARITY) * GRANULARITY for edge in edges(flow, stages) if edge.on_gpu)


def first_step_capacity(first: ModelConfig) -> int:
    """Requests that the first step holds before it rejects: its queues, and for each instance a batch that runs and one
    that is formed. `first` is that step's model, the guard."""
    queued = sum(policy.max_queue_size for policy in first.dynamic_batching.priority_queue_policy.values())
    instances = sum(group.count for group in first.instance_group)
    return queued + 2 * instances * first.max_batch_size


def step_limit(first: ModelConfig) -> int:
    """`max_inflight_requests` of every ensemble. It bounds each step, the first among them, and makes whoever comes
    next wait: at the first step that would be a thread of the server's front end, so the limit is more than that step
    holds, which rejects before; at the others it is the step before, so that a queue that grows anywhere grows back to
    the first."""
    return first_step_capacity(first) + FRONT_END_THREADS


def images_in_flight(flow: Flow, first: ModelConfig) -> int:
    """The most that can be on their way through `flow`: in the first step, and in every later one up to its limit."""
    return first_step_capacity(first) + (len(guarded(flow).steps) - 1) * step_limit(first)


def pool_bytes(flows: Iterable[str], stages: Mapping[str, Mapping], first: ModelConfig) -> int:
    """The pool for all of `flows` on one GPU, in whole MiB."""
    need = sum(images_in_flight(FLOWS[flow], first) * bytes_per_image(FLOWS[flow], stages) for flow in flows)
    return -(-need // MIB) * MIB


def server_flags(flows: Iterable[str], stages: Mapping[str, Mapping], first: ModelConfig) -> list[str]:
    """What tritonserver has to be started with for the bounds to hold and the pool to be large enough: one GPU for each
    server."""
    pool = pool_bytes(flows, stages, first)
    return [f"--model-config-name={BOUNDED.stem}", f"--cuda-memory-pool-byte-size=0:{pool}"]


def table(flow: Flow, stages: Mapping[str, Mapping]) -> str:
    """The edges of `flow` as Markdown."""
    rows = ["| tensor | from | to | bytes per image | memory |", "|---|---|---|---:|---|"]
    for edge in edges(flow, stages):
        memory, size = "GPU pool" if edge.on_gpu else "host", "the file's" if edge.bytes is None else f"{edge.bytes:,}"
        rows.append(f"| `{edge.tensor}` | {edge.source} | {', '.join(edge.targets)} | {size} | {memory} |")
    return "\n".join(rows)


def summary(flows: Iterable[str], stages: Mapping[str, Mapping], first: ModelConfig) -> str:
    """Bytes, images and pool of each flow as Markdown."""
    rows = ["| flow | KiB per image | images in flight, at most | MiB of the pool |", "|---|---:|---:|---:|"]
    for flow in flows:
        each, images = bytes_per_image(FLOWS[flow], stages), images_in_flight(FLOWS[flow], first)
        rows.append(f"| `{flow}` | {each / 1024:,.0f} | {images:,} | {each * images / MIB:,.0f} |")
    return "\n".join(rows)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scaphoid.triton_repo.memory DIR: artefacts or a model repository")
    try:
        manifest = read_manifest(Path(sys.argv[1]))
        first = read(Path(__file__).parent / "gpu" / FIRST["gpu"] / CONFIG)
    except (ManifestError, ConfigError) as error:
        sys.exit(f"memory: {error}")
    flows, stages = manifest["flows"], manifest["stages"]
    for flow in flows:
        print(f"{flow}\n\n{table(FLOWS[flow], stages)}\n")
    print(summary(flows, stages, first), *server_flags(flows, stages, first), sep="\n")


if __name__ == "__main__":
    main()

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
from scaphoid.trainer.contracts import ENCODED, ORIGINAL_SIZE
from scaphoid.trainer.flows import FLOWS, Flow
from scaphoid.triton_repo.configs import CONFIG, ConfigError, read

BOUNDED = Path("configs") / "bounded.pbtxt"  # of an ensemble: its config.pbtxt with max_inflight_requests
SERVER_FLAGS = "server.flags"  # in the repository, a flag a line
GRANULARITY = 512  # bytes: CNMeM, the pool's allocator, rounds up to them
FRONT_END_THREADS = 16  # that may be about to enter the first step's queue at once
MIB = 2**20
HOST = {ENCODED.name: "the client's file", ORIGINAL_SIZE.name: "DALI computes shapes on the CPU"}


@dataclass(frozen=True)
class Edge:
    """One tensor of a flow, of one image. `source` and `targets` are steps."""

    tensor: str
    source: str
    targets: tuple[str, ...]
    bytes: int
    on_gpu: bool


def edges(flow: Flow, stages: Mapping[str, Mapping]) -> list[Edge]:
    """Every tensor that a step hands on or answers with. `stages`: those of a manifest, which knows their sizes."""
    found = []
    for step in flow.steps:
        for tensor in stages[step.stage.name]["outputs"]:
            name = step.outputs[tensor["name"]]
            targets = tuple(each.name for each in flow.steps if name in each.inputs.values())
            targets += ("the answer",) if name in flow.outputs else ()
            if targets:
                size = math.prod(tensor["dims"]) * triton_to_np_dtype(tensor["dtype"])().itemsize
                found.append(Edge(name, step.name, targets, size, name not in HOST))
    return found


def bytes_per_image(flow: Flow, stages: Mapping[str, Mapping]) -> int:
    """Of the pool, if every tensor of an image were alive at once; they are not, Triton frees each after its last
    step."""
    return sum(-(-edge.bytes // GRANULARITY) * GRANULARITY for edge in edges(flow, stages) if edge.on_gpu)


def first_step_capacity(preprocess: ModelConfig) -> int:
    """Requests that the first step holds before it rejects: its queues, and for each instance a batch that runs and one
    that is formed."""
    queued = sum(policy.max_queue_size for policy in preprocess.dynamic_batching.priority_queue_policy.values())
    instances = sum(group.count for group in preprocess.instance_group)
    return queued + 2 * instances * preprocess.max_batch_size


def step_limit(preprocess: ModelConfig) -> int:
    """`max_inflight_requests` of every ensemble. It bounds each step, the first among them, and makes whoever comes
    next wait, at the first step a thread of the server's front end: so it is more than that step holds, which rejects
    before."""
    return first_step_capacity(preprocess) + FRONT_END_THREADS


def images_in_flight(flow: Flow, preprocess: ModelConfig) -> int:
    """The most that can be on their way through `flow`: in the first step, and in every later one up to its limit."""
    return first_step_capacity(preprocess) + (len(flow.steps) - 1) * step_limit(preprocess)


def pool_bytes(flows: Iterable[str], stages: Mapping[str, Mapping], preprocess: ModelConfig) -> int:
    """The pool for all of `flows` on one GPU, in whole MiB."""
    need = sum(images_in_flight(FLOWS[flow], preprocess) * bytes_per_image(FLOWS[flow], stages) for flow in flows)
    return -(-need // MIB) * MIB


def server_flags(flows: Iterable[str], stages: Mapping[str, Mapping], preprocess: ModelConfig) -> list[str]:
    """What tritonserver has to be started with for the bounds to hold and the pool to be large enough: one GPU for each
    server."""
    pool = pool_bytes(flows, stages, preprocess)
    return [f"--model-config-name={BOUNDED.stem}", f"--cuda-memory-pool-byte-size=0:{pool}"]


def table(flow: Flow, stages: Mapping[str, Mapping]) -> str:
    """The edges of `flow` as Markdown."""
    rows = ["| tensor | from | to | bytes per image | memory |", "|---|---|---|---:|---|"]
    for edge in edges(flow, stages):
        memory = "GPU pool" if edge.on_gpu else "host"
        rows.append(f"| `{edge.tensor}` | {edge.source} | {', '.join(edge.targets)} | {edge.bytes:,} | {memory} |")
    return "\n".join(rows)


def summary(flows: Iterable[str], stages: Mapping[str, Mapping], preprocess: ModelConfig) -> str:
    """Bytes, images and pool of each flow as Markdown."""
    rows = ["| flow | KiB per image | images in flight, at most | MiB of the pool |", "|---|---:|---:|---:|"]
    for flow in flows:
        each, images = bytes_per_image(FLOWS[flow], stages), images_in_flight(FLOWS[flow], preprocess)
        rows.append(f"| `{flow}` | {each / 1024:,.0f} | {images:,} | {each * images / MIB:,.0f} |")
    return "\n".join(rows)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scaphoid.triton_repo.memory DIR: artefacts or a model repository")
    try:
        manifest = read_manifest(Path(sys.argv[1]))
        preprocess = read(Path(__file__).parent / "gpu" / "preprocess" / CONFIG)
    except (ManifestError, ConfigError) as error:
        sys.exit(f"memory: {error}")
    flows, stages = manifest["flows"], manifest["stages"]
    for flow in flows:
        print(f"{flow}\n\n{table(FLOWS[flow], stages)}\n")
    print(summary(flows, stages, preprocess), *server_flags(flows, stages, preprocess), sep="\n")


if __name__ == "__main__":
    main()

import re
import subprocess
import sys

import pytest

from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import CONFIGS
from scaphoid.triton_repo.configs import CONFIG, FIRST, GUARDED, read
from scaphoid.triton_repo.memory import (
    GRANULARITY,
    MIB,
    bytes_per_image,
    edges,
    first_step_capacity,
    images_in_flight,
    pool_bytes,
    server_flags,
    step_limit,
    summary,
    table,
)

SIZES = {"height": 448, "width": 448, "part_height": 224, "part_width": 224, "key_height": 224, "key_width": 224}
MAPS = {"msfm": 14, "msfm_fma": 14, "kalm": 7}  # KALM's global CNN sees the image at 224


def described(flow: str) -> dict:
    """A manifest's stages for ResNet-50 and images of 448 pixels, as in the papers."""
    sizes = SIZES | {"map_height": MAPS[flow], "map_width": MAPS[flow]}

    def describe(tensors) -> list[dict]:
        return [{"name": t.name, "dtype": t.dtype, "dims": [sizes.get(dim, dim) for dim in t.dims]} for t in tensors]

    return {name: {"outputs": describe(STAGES[name].outputs)} for name in FLOWS[flow].stages}


@pytest.fixture
def first():
    return read(CONFIGS["gpu"] / FIRST["gpu"] / CONFIG)


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_every_wire_of_the_ensemble_is_an_edge(flow):
    found = {edge.tensor: edge for edge in edges(FLOWS[flow], described(flow))}
    written = read(CONFIGS["gpu"] / flow / CONFIG).ensemble_scheduling.step
    assert {name for step in written for name in step.output_map.values()} == set(found)
    takers = [name for step in written for name in step.input_map.values() if name != "encoded"]
    assert sorted(takers) == sorted(
        name for name, edge in found.items() for target in edge.targets if target != "the answer"
    )
    assert {name for name, edge in found.items() if "the answer" in edge.targets} == set(FLOWS[flow].outputs)
    assert [name for name, edge in found.items() if not edge.on_gpu] == [GUARDED, "original_size"]
    assert (found[GUARDED].source, found[GUARDED].targets, found[GUARDED].bytes) == ("guard", ("preprocess",), None)


def test_bytes_of_an_image():
    found = {edge.tensor: edge.bytes for edge in edges(FLOWS["msfm"], described("msfm"))}
    assert found["image"] == found["object_image"] == 448 * 448
    assert found["part_images"] == 7 * 224 * 224
    assert found["main_activation"] == 14 * 14 * 4
    assert found["original_size"] == 2 * 4
    on_host = {GUARDED, "original_size"}
    small = sum(-(-size // GRANULARITY) * GRANULARITY for name, size in found.items() if name not in on_host)
    assert bytes_per_image(FLOWS["msfm"], described("msfm")) == small


def test_the_pool_holds_all_images_that_the_bounds_let_in(first):
    capacity = first_step_capacity(first)
    assert capacity == 32 + 32 + 2 * 2  # both queues, for each instance the image that is read and the next
    assert step_limit(first) > capacity  # or a thread of the front end would wait where a request is to be refused
    behind = len(FLOWS["kalm"].steps)  # the guard: every step of the table
    assert images_in_flight(FLOWS["kalm"], first) == capacity + behind * step_limit(first)
    pool = pool_bytes(["kalm"], described("kalm"), first)
    need = images_in_flight(FLOWS["kalm"], first) * bytes_per_image(FLOWS["kalm"], described("kalm"))
    assert pool % MIB == 0
    assert need <= pool < need + MIB
    assert f"--cuda-memory-pool-byte-size=0:{pool}" in server_flags(["kalm"], described("kalm"), first)


def test_twice_the_queue_needs_more_of_the_pool(first):
    before = pool_bytes(["msfm"], described("msfm"), first)
    first.dynamic_batching.priority_queue_policy[2].max_queue_size *= 2
    assert pool_bytes(["msfm"], described("msfm"), first) > before


def test_the_page_tells_what_the_functions_compute(first):
    page = (CONFIGS["gpu"] / "README.md").read_text()
    assert table(FLOWS["msfm_fma"], described("msfm_fma")) in page  # has all that msfm has, and one image more
    assert table(FLOWS["kalm"], described("kalm")) in page
    rows = [summary([flow], described(flow), first).splitlines() for flow in FLOWS]
    assert "\n".join([*rows[0][:2], *(row[2] for row in rows)]) in page
    pool = sum(int(re.search(r"([\d,]+) \|$", row[2])[1].replace(",", "")) for row in rows)
    assert f"{pool:,} MiB" in page


def test_assembling_needs_no_torch():
    """It runs where a GPU is, beside TensorRT."""
    program = "import sys; import scaphoid.triton_repo.assemble; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""The static report of the CUDA kernels: what it counts is there, and what should not be is told."""

import subprocess
from collections import Counter

import numpy as np
import pytest

from scaphoid.bench.kernel_report.encoders import PASSES, layers
from scaphoid.bench.kernel_report.gpus import GPUS, LIMITS, Gpu, occupancy
from scaphoid.bench.kernel_report.report import (
    Traced,
    glue_table,
    instructions_table,
    resources_table,
    roofline_table,
    traffic_table,
    warnings,
)
from scaphoid.bench.kernel_report.sass import Kernel, ToolMissing, kernels_of, kind_of, read_sass, tool
from scaphoid.bench.kernel_report.trace import Accesses, Launch
from scaphoid.bench.kernel_report.workloads import Workload, covered, workloads

SASS = """
	.section	.text.copy,"ax",@progbits
.text.copy:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDG.E.U8.CONSTANT R9, desc[UR6][R8.64+0x4] ;
        /*0030*/                   CALL.REL.NOINC `($__internal_1_$__cuda_sm20_div_s64) ;
        /*0040*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0050*/              @UP0 FFMA R1, R1, R2, R3 ;
        /*0060*/                   DADD R2, R2, R4 ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/                   STG.E.64 [R2.64], R4 ;
        /*0090*/                   STG.E [R2.64], R4 ;
        /*00a0*/                   NOP ;
.text.other:
        /*0000*/                   EXIT ;
"""


def accesses(sectors: int = 0, needed: int = 0, distinct: int = 0) -> Accesses:
    return Accesses(sectors, sectors, 4, needed, distinct, {"4": 32 * sectors} if sectors else {})


def traced(**flows: int) -> Traced:
    launches = (
        Launch("copy", 10, 256, 512, accesses(200, 100, 100), accesses(100, 100, 100)),
        Launch("sum", 1, 32, 0, accesses(4, 4, 4), accesses(1, 1, 1)),
    )
    return Traced(Workload("copying", 3200, 1000, 10, lambda tracer: [], flows), launches)


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "share", "limit"),
    [
        (80, 256, 32, 0, 8, 1.0, "warps"),
        (75, 1024, 64, 0, 1, 1.0, "warps"),
        (80, 256, 33, 0, 6, 0.75, "registers"),  # 40 registers a thread are given: 51 warps, of which 48
        (86, 128, 255, 0, 2, 1 / 6, "registers"),
        (86, 32, 16, 0, 16, 1 / 3, "blocks"),
        (90, 256, 40, 100 * 1024, 2, 0.25, "shared memory"),
        (89, 256, 16, 24 * 1024, 4, 2 / 3, "shared memory"),  # 25 KiB each with the system's
        (75, 256, 16, 16 * 1024, 4, 1.0, "warps"),  # no share for the system
    ],
)
def test_occupancy_is_what_the_scarcest_resource_leaves(architecture, threads, registers, shared, blocks, share, limit):
    held = occupancy(architecture, threads, registers, shared)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.share == pytest.approx(share)
    assert held.warps == blocks * -(-threads // 32)


def test_every_architecture_of_the_build_and_every_gpu_has_limits():
    from scaphoid.kernels.build_ops import ARCHITECTURES

    assert set(ARCHITECTURES) == set(LIMITS)
    assert {gpu.architecture for gpu in GPUS} <= set(LIMITS)


def test_the_roofline_is_the_slowest_of_memory_and_arithmetic():
    gpu = Gpu("g", 90, 1000, 10, 1, 100, "a data sheet")
    assert gpu.roofline_us(1e6) == pytest.approx(1)
    assert gpu.roofline_us(1e6, fp32_flop=5e7) == pytest.approx(5)
    assert gpu.roofline_us(1e6, fp32_flop=5e7, fp64_flop=7e6) == pytest.approx(7)
    assert gpu.roofline_us(1e6, fp16_flop=9e8) == pytest.approx(9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LDG", "global load"),
        ("LD", "global load"),
        ("STG", "global store"),
        ("RED", "global atomic"),
        ("ATOMG", "global atomic"),
        ("LDS", "shared"),
        ("ATOMS", "shared"),
        ("LDL", "local"),
        ("DSETP", "fp64"),
        ("FFMA", "fp32"),
        ("MUFU", "fp32"),
        ("HADD2", "fp16"),
        ("I2F", "conversion"),
        ("IMAD", "integer"),
        ("IADD3", "integer"),
        ("SHF", "integer"),
        ("SHFL", "warp"),
        ("CALL", "call"),
        ("BAR", "barrier"),
        ("BSSY", "branch"),
        ("LDC", "other"),
        ("MOV", "other"),
        ("PLOP3", "other"),
    ],
)
def test_instructions_have_a_kind(name, kind):
    assert kind_of(name) == kind


def test_machine_code_is_counted_by_kernel_kind_and_width():
    kernels = {"copy": Kernel("copy", 80)}
    read_sass(SASS, kernels)
    copy = kernels["copy"]
    assert copy.loads == {128: 1, 8: 1}
    assert copy.stores == {64: 1, 32: 1}
    assert copy.calls == {"sm20_div_s64": 1}
    assert copy.divisions64 == 1
    counted = {
        "global load": 2,
        "global store": 2,
        "call": 1,
        "integer": 1,
        "fp32": 1,
        "fp64": 1,
        "local": 1,
        "other": 1,
    }
    assert copy.instructions == counted  # a move by IMAD is no arithmetic, padding nothing


def test_a_kernel_knows_its_name_without_template_arguments():
    assert Kernel("crop<float, 4>", 80).base == "crop"
    assert Kernel("map_boxes_kernel", 80).base == "map_boxes_kernel"


def test_resources_take_the_block_of_the_traced_launch():
    kernels = [Kernel("copy<float>", 80, 40, 1024), Kernel("unused", 80, 40)]
    first, second = resources_table(kernels, [traced()]).records()
    held = occupancy(80, 256, 40, 1024 + 512)
    assert (first["block (threads)"], first["occupancy (%)"]) == (256, 100 * held.share)
    assert second["occupancy (%)"] is None


def test_instructions_show_widths_and_flag_64_bit_divisions():
    kernel = Kernel("copy", 80, loads=Counter({32: 2, 128: 1}), calls=Counter({"sm20_div_s64": 2, "sm20_dsqrt": 1}))
    (row,) = instructions_table([kernel]).records()
    assert row["global loads x bits"] == "2 x 32, 1 x 128"
    assert row["64-bit divisions (calls)"] == 2
    assert "sm20_dsqrt" in row["calls"]


def test_warnings_name_the_kernels():
    clean = Kernel("clean", 80)
    assert warnings([clean], [traced()]) == [
        "no kernel spills, uses local memory, divides 64-bit integers or calls a slow path"
    ]
    dirty = Kernel("dirty", 80, stack=8, calls=Counter({"sm20_rem_u64": 1}))
    untraced = Traced(traced().workload, (), "no executor")
    text = "\n".join(warnings([clean, dirty], [untraced]))
    assert "LOCAL MEMORY (spills or stack): dirty (sm_80)" in text
    assert "64-BIT DIVISION: dirty" in text
    assert "CALLS: sm20_rem_u64 in 1 kernels" in text
    assert "not traced: copying: no executor" in text


def test_traffic_counts_sectors_and_holds_them_against_the_minimum():
    first, second = traffic_table([traced()]).records()
    assert (first["loads packed (%)"], first["stores packed (%)"]) == (50, 100)
    assert first["requested (kB)"] == pytest.approx(300 * 32 / 1e3)
    assert first["moved (kB)"] == pytest.approx(200 * 32 / 1e3)
    assert first["all moved over minimum (times)"] == pytest.approx(205 * 32 / 3200)
    assert second["minimum (kB)"] is None


def test_a_workload_without_a_trace_stands_with_its_minimum():
    assert Traced(traced().workload, (), "no executor").moved_bytes == 3200


def test_glue_counts_what_a_flow_runs_as_often_as_it_does():
    each = traced(msfm=2)
    (h100,) = [row for row in glue_table([each]).records() if (row["flow"], row["GPU"]) == ("msfm", "H100 SXM")]
    (row,) = roofline_table([each]).records()
    assert h100["ops (us)"] == pytest.approx(2 * row["H100 SXM (us)"])
    assert h100["launches (count)"] == 4
    encoders = next(value for name, value in h100.items() if name.startswith("encoders"))
    assert h100["ops of encoders (%)"] == pytest.approx(100 * h100["ops (us)"] / encoders)


def test_encoders_are_resnet50_at_the_products_sizes():
    gflop = sum(layer.flop for layer in layers(1, 448)) / 1e9
    assert gflop == pytest.approx(32.7, rel=0.01)
    weights_once = sum(layer.moved_bytes for layer in layers(7, 224)) < 7 * sum(
        layer.moved_bytes for layer in layers(1, 224)
    )
    assert weights_once
    assert set(PASSES) == {flow for each in workloads() for flow in each.flows}


def test_minimum_bytes_are_those_of_the_contract():
    minimum = {each.name: each.minimum_bytes for each in workloads()}
    assert minimum["suppress_artifacts"] == 2 * 448 * 448 + 4 * 14 * 14
    assert minimum["activation_maps float16"] == 2 * 2048 * 196 + 4 * 2 * 2048 + 2 * 4 * 196
    assert minimum["crop_resize object"] == 352 * 352 + 448 * 448 + 16
    assert covered(np.array([[0, 0, 10, 10], [5, 0, 15, 10]], np.float32)) == 150


def test_a_library_without_gpu_code_is_told(tmp_path):
    library = tmp_path / "nothing.so"
    library.write_bytes(b"no ELF")
    try:
        tool("cuobjdump")
    except ToolMissing as missing:
        pytest.skip(str(missing))
    with pytest.raises((ValueError, subprocess.CalledProcessError)):
        kernels_of(library)


def test_a_missing_tool_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolMissing, match="pip install nvidia-cuda-cufoo"):
        tool("cufoo")


@pytest.mark.slow
def test_a_compiled_kernel_is_read_with_its_divisions_and_widths(tmp_path):
    from scaphoid.kernels.build_ops import find_nvcc

    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    source = tmp_path / "slow.cu"
    source.write_text(
        "template <class T> __global__ void slow(const float4* a, T* b, long long n, double* d) {\n"
        "  const long long i = threadIdx.x;\n"
        "  const float4 v = a[i];\n"
        "  b[i / n] = v.x + v.y + v.z + v.w;\n"
        "  d[i] = d[i] + 1;\n"
        "}\n"
        "template __global__ void slow<float>(const float4*, float*, long long, double*);\n"
    )
    library = tmp_path / "slow.so"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    subprocess.run([nvcc, *targets, "-shared", "-Xcompiler", "-fPIC", source, "-o", library], check=True)
    kernels = kernels_of(library)
    assert [(kernel.name, kernel.architecture) for kernel in kernels] == [("slow<float>", 80), ("slow<float>", 90)]
    for kernel in kernels:
        assert kernel.registers > 0
        assert (kernel.shared, kernel.stack) == (0, 0)
        assert kernel.loads == {128: 1, 64: 1}
        assert kernel.stores == {32: 1, 64: 1}
        assert kernel.divisions64 == 1
        assert kernel.instructions["fp64"] >= 1

"""The tracer of the CUDA kernels: every global access that they make under the SIMT executor is counted."""

import shutil

import numpy as np
import pytest

from scaphoid.bench.kernel_report import report, trace
from scaphoid.bench.kernel_report.trace import TraceUnavailable, array, build_tracer

KERNELS = """
#include "launch.h"
#include <cstdint>
namespace {
__global__ void rows(const float* from, float* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i] + from[0];
}
__global__ void columns(const float* from, float* to, int side) {
  SHARED_ARRAY(float, row, 32);
  row[threadIdx.x] = from[threadIdx.x * side + blockIdx.x];
  __syncthreads();
  to[blockIdx.x * 32 + threadIdx.x] = row[31 - threadIdx.x];
}
__global__ void words(const uint8_t* from, uint8_t* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint4 four = reinterpret_cast<const uint4*>(from)[i];
  reinterpret_cast<uint4*>(to)[i] = make_uint4(four.x + 1, four.y, four.z, four.w);
}
}
extern "C" int scaphoid_rows_cuda(const float* from, float* to, int64_t n, void* stream) {
  LAUNCH(rows, dim3((n + 63) / 64), 64, 0, stream, from, to, static_cast<int>(n));
  return cudaGetLastError();
}
extern "C" int scaphoid_columns_cuda(const float* from, float* to, int64_t side, void* stream) {
  LAUNCH(columns, static_cast<unsigned>(side), 32, 16, stream, from, to, static_cast<int>(side));
  LAUNCH(words, 1, 32, 0, stream, reinterpret_cast<const uint8_t*>(from), reinterpret_cast<uint8_t*>(to));
  return cudaGetLastError();
}
"""


@pytest.fixture(scope="module")
def tracer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    sources = folder / "sources" / "cuda"
    sources.mkdir(parents=True)
    shutil.copy(trace.SOURCES / "cuda" / "launch.h", sources)
    (sources / "some.cu").write_text(KERNELS)
    patch = pytest.MonkeyPatch()
    patch.setattr(trace, "SOURCES", sources.parent)
    try:
        return build_tracer(folder)
    except TraceUnavailable as reason:
        pytest.skip(str(reason))
    finally:
        patch.undo()


@pytest.mark.slow
def test_the_trace_counts_every_access_and_knows_rows_from_columns(tracer):
    n = 100  # off the block's 64 and the warp's 32
    source, target = array((n,), np.float32, np.arange(n)), array((n,), np.float32)
    (rows,) = tracer("rows", source, target, n)
    assert np.array_equal(target, source)  # from[0] is 0: the kernel really ran
    assert (rows.kernel, rows.blocks, rows.threads, rows.shared) == ("rows", 2, 64, 0)
    assert rows.stores.by_width == {"4": n}
    assert rows.loads.by_width == {"4": 2 * n}
    assert rows.stores.requests == 4
    assert rows.stores.packed == 1
    assert rows.loads.packed == 1  # one address for a whole warp is one sector, and no more is needed
    assert rows.loads.distinct_sectors == rows.stores.distinct_sectors == -(-4 * n // 32)

    side = 32
    matrix, out = (
        array((side, side), np.float32, np.arange(side * side).reshape(side, side)),
        array((side, side), np.float32),
    )
    columns, words = tracer("columns", matrix, out, side)
    assert columns.loads.packed == pytest.approx(1 / 8)  # a sector for each of a warp's 32 threads, of which 4 would do
    assert (columns.loads.most_sectors, columns.stores.most_sectors) == (32, 4)
    assert columns.stores.packed == 1
    assert columns.loads.sectors == 8 * columns.loads.distinct_sectors
    assert columns.shared == 16
    assert columns.loads.by_width == {"4": side * side}  # shared memory is none of it
    assert words.loads.by_width == words.stores.by_width == {"16": 32}  # a vector is one access
    assert words.loads.packed == words.stores.packed == 1
    assert words.requested_bytes == words.distinct_bytes == 2 * 16 * 32


@pytest.mark.slow
def test_an_op_that_is_not_there_or_refuses_is_told(tracer):
    with pytest.raises(TraceUnavailable, match="scaphoid_nothing_cuda is not among the kernels"):
        tracer("nothing", array((1,), np.float32))
    with pytest.raises(TraceUnavailable, match="refused with error"):
        tracer("rows", array((1,), np.float32), array((1,), np.float32), 0)  # a grid of no blocks


def test_without_an_executor_the_trace_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(trace, "EXECUTOR", tmp_path / "none")
    assert {each.reason for each in report.trace_all()} == {
        "the SIMT executor (kernels/simt) or the kernels (kernels/csrc/cuda) are not here"
    }

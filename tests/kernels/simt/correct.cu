// Correct kernels, each against plain C++, over several orders of threads: says what differs; exit 0 if nothing does.
// Every buffer is a malloc of its exact size.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "launch.h"

extern "C" void scaphoid_simt_seed(unsigned long long seed);
extern "C" const char* scaphoid_simt_error();

namespace {

constexpr unsigned kWholeWarp = 0xffffffffU;

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds && ++failures <= 20) std::printf("%s\n", what);
}

template <class T>
std::unique_ptr<T[]> buffer(size_t count) {
  return std::make_unique<T[]>(count);
}

__global__ void reduction(const int* values, int count, int* sums) {
  SHARED_ARRAY(int, of_warps, 8);
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) sum += values[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(kWholeWarp, sum, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : 0;
  for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes, 8);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

void check_reduction() {
  const int count = 1237, blocks = 3;
  auto values = buffer<int>(count), sums = buffer<int>(blocks);
  int expected = 0;
  for (int i = 0; i < count; ++i) expected += values[i] = i * 7 % 101 - 50;
  LAUNCH(reduction, blocks, 256, 0, nullptr, values.get(), count, sums.get());
  expect(sums[0] + sums[1] + sums[2] == expected, "block reduction");
}

// Values above the limit, in their order, within each warp of a block of three.
__global__ void compaction(const int* values, int limit, int* kept, int* counts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, value = values[threadIdx.x];
  const unsigned above = __ballot_sync(kWholeWarp, value > limit);
  if (value > limit) kept[warp * 32 + __popc(above & ((1U << lane) - 1))] = value;
  if (lane == 0) counts[warp] = __popc(above);
  const bool any = __any_sync(kWholeWarp, value > limit), all = __all_sync(kWholeWarp, value > limit);
  if (any != (above != 0) || all != (above == kWholeWarp)) counts[warp] = -1;
}

void check_compaction() {
  auto values = buffer<int>(96), kept = buffer<int>(96), counts = buffer<int>(3);
  for (int i = 0; i < 96; ++i) values[i] = i * 37 % 64;
  LAUNCH(compaction, 1, 96, 0, nullptr, values.get(), 30, kept.get(), counts.get());
  for (int warp = 0; warp < 3; ++warp) {
    int count = 0;
    for (int i = warp * 32; i < warp * 32 + 32; ++i) {
      if (values[i] > 30) expect(kept[warp * 32 + count++] == values[i], "ballot compaction: value");
    }
    expect(counts[warp] == count, "ballot compaction: count");
  }
}

// The lanes that hold the same value elect one, which adds for all.
__global__ void histogram(const int* values, unsigned* bins) {
  const int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  const unsigned alike = __match_any_sync(kWholeWarp, value);
  if (__ffs(static_cast<int>(alike)) - 1 == static_cast<int>(threadIdx.x % 32)) atomicAdd(bins + value, __popc(alike));
}

void check_histogram() {
  auto values = buffer<int>(256);
  auto bins = buffer<unsigned>(7);
  unsigned expected[7] = {};
  for (int i = 0; i < 256; ++i) ++expected[values[i] = i * i % 7];
  LAUNCH(histogram, 4, 64, 0, nullptr, values.get(), bins.get());
  expect(std::memcmp(bins.get(), expected, sizeof expected) == 0, "match-any histogram");
}

__global__ void scale_pairs(const __half2* a, const __half2* b, __half2* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = __hfma2(a[i], b[i], __hadd2(a[i], __float2half2_rn(0.25F)));
}

// Differs from the fused result only if something is rounded twice.
void check_pairs() {
  const int count = 77;
  auto a = buffer<__half2>(count), b = buffer<__half2>(count), out = buffer<__half2>(count);
  for (int i = 0; i < count; ++i) {
    a[i] = __floats2half2_rn(0.37F * i - 9, 1.0F / (i + 1));
    b[i] = __floats2half2_rn(1.0F - 0.013F * i, 3.7F * i);
  }
  LAUNCH(scale_pairs, dim3(2), dim3(64), 0, nullptr, a.get(), b.get(), out.get(), count);
  const auto plain = [](__half a, __half b) {
    const long double sum = __half2float(__float2half_rn(__half2float(a) + 0.25F));
    return __double2half(static_cast<double>(static_cast<long double>(__half2float(a)) * __half2float(b) + sum));
  };
  for (int i = 0; i < count; ++i) {
    expect(__half_as_ushort(out[i].x) == __half_as_ushort(plain(a[i].x, b[i].x)), "half2 arithmetic: x");
    expect(__half_as_ushort(out[i].y) == __half_as_ushort(plain(a[i].y, b[i].y)), "half2 arithmetic: y");
  }
}

// A tile a block, through shared memory of which the launch says the size.
__global__ void transposition(const float* in, int rows, int columns, float* out) {
  DYNAMIC_SHARED(float, tile);
  const int pitch = blockDim.x + 1, left = blockIdx.x * blockDim.x, top = blockIdx.y * blockDim.y;
  const int x = left + threadIdx.x, y = top + threadIdx.y;
  if (x < columns && y < rows) tile[threadIdx.y * pitch + threadIdx.x] = in[y * columns + x];
  __syncthreads();
  const int new_x = top + threadIdx.x, new_y = left + threadIdx.y;
  if (new_x < rows && new_y < columns) out[new_y * rows + new_x] = tile[threadIdx.x * pitch + threadIdx.y];
}

void check_transposition() {
  const int rows = 37, columns = 21;
  auto in = buffer<float>(rows * columns), out = buffer<float>(rows * columns);
  for (int i = 0; i < rows * columns; ++i) in[i] = i;
  LAUNCH(transposition, dim3((columns + 15) / 16, (rows + 15) / 16), dim3(16, 16), 16 * 17 * sizeof(float), nullptr,
         in.get(), rows, columns, out.get());
  for (int i = 0; i < rows * columns; ++i) {
    expect(out[i % columns * rows + i / columns] == in[i], "transposition through dynamic shared memory");
  }
}

struct Totals {
  int sum, least, most;
  unsigned bits, common;
  unsigned long long wide;
  float real;
  double real_wide;
  int taken, locked;
};

__global__ void totals(Totals* all) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&all->sum, i);
  atomicMin(&all->least, 5 - i);
  atomicMax(&all->most, i);
  atomicOr(&all->bits, 1U << i % 32);
  atomicAnd(&all->common, ~(1U << i % 3));
  atomicAdd(&all->wide, 1ULL << 33);
  atomicAdd(&all->real, 0.5F);
  atomicAdd(&all->real_wide, 0.25);
  if (atomicExch(&all->taken, 1) == 0) atomicAdd(&all->locked, 1000);
  for (int seen = 0, before; (before = atomicCAS(&all->locked, seen, seen + 1)) != seen;) seen = before;
}

void check_totals() {
  auto all = buffer<Totals>(1);
  all[0].common = ~0U;
  LAUNCH(totals, 3, 40, 0, nullptr, all.get());
  expect(all[0].sum == 119 * 60 && all[0].least == -114 && all[0].most == 119, "atomicAdd, atomicMin, atomicMax");
  expect(all[0].bits == ~0U && all[0].common == ~7U, "atomicOr, atomicAnd");
  expect(all[0].wide == 120ULL << 33 && all[0].real == 60 && all[0].real_wide == 30,
         "atomicAdd of wide and real numbers");
  expect(all[0].taken == 1 && all[0].locked == 1120, "atomicExch, atomicCAS");
}

__global__ void shuffles(int width, int by, int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(kWholeWarp, lane, by, width);
  out[32 + lane] = __shfl_up_sync(kWholeWarp, lane, by, width);
  out[64 + lane] = __shfl_down_sync(kWholeWarp, lane, by, width);
  out[96 + lane] = __shfl_xor_sync(kWholeWarp, lane, by, width);
}

void check_shuffles() {
  auto out = buffer<int>(128);
  for (int width = 1; width <= 32; width *= 2) {
    for (const int by : {0, 1, 3, 8, 17, 31}) {
      LAUNCH(shuffles, 1, 32, 0, nullptr, width, by, out.get());
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / width, other = lane ^ by;
        expect(out[lane] == group * width + by % width, "__shfl_sync");
        expect(out[32 + lane] == (lane % width >= by ? lane - by : lane), "__shfl_up_sync");
        expect(out[64 + lane] == (lane % width + by < width ? lane + by : lane), "__shfl_down_sync");
        expect(out[96 + lane] == (other / width <= group ? other : lane), "__shfl_xor_sync");
      }
    }
  }
}

// Two halves of a warp go their own ways, at their own pace, and meet again; wide and narrow types travel.
__global__ void halves(double* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  double value = lane;
  if (lane < 16) {
    for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0x0000ffffU, value, lanes);
  } else {
    value = __half2float(__shfl_sync(0xffff0000U, __float2half(value), 20));
  }
  __syncwarp();
  out[threadIdx.x] = value + __shfl_sync(kWholeWarp, value, 31 - lane);
}

void check_halves() {
  auto out = buffer<double>(64);
  LAUNCH(halves, 1, 64, 0, nullptr, out.get());
  for (int i = 0; i < 64; ++i) expect(out[i] == 120 + 20, "two halves of a warp");
}

__global__ void places(unsigned* out, int* votes) {
  const unsigned in_block = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned in_grid = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned place = in_grid * blockDim.x * blockDim.y * blockDim.z + in_block;
  out[place] += place;
  const int count = __syncthreads_count(in_block % 3 == 0), any = __syncthreads_or(in_block == 29);
  const int all = __syncthreads_and(in_block < 29), all_of_all = __syncthreads_and(in_block < 30);
  if (in_block == 7) votes[in_grid] = count * 1000 + any * 100 + all * 10 + all_of_all;
}

void check_places() {
  auto out = buffer<unsigned>(24 * 30);
  auto votes = buffer<int>(24);
  LAUNCH(places, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, out.get(), votes.get());
  for (unsigned i = 0; i < 24 * 30; ++i) expect(out[i] == i, "indices in three dimensions");
  for (int i = 0; i < 24; ++i) expect(votes[i] == 10101, "__syncthreads_count, _or, _and");
}

// Every instance of a template has its own shared array.
template <class T>
__device__ T through_shared(T value) {
  SHARED_ARRAY(T, values, 32);
  values[threadIdx.x] = value;
  __syncthreads();
  return values[31 - threadIdx.x];
}

__global__ void instances(double* out) {
  const float narrow = through_shared(static_cast<float>(threadIdx.x));
  out[threadIdx.x] = through_shared(100.0 * threadIdx.x) + narrow;
}

void check_instances() {
  auto out = buffer<double>(32);
  LAUNCH(instances, 1, 32, 0, nullptr, out.get());
  for (int i = 0; i < 32; ++i) expect(out[i] == 101 * (31 - i), "shared arrays of a template");
}

__global__ void large_blocks(float* out) {
  DYNAMIC_SHARED(float, values);
  for (int i = threadIdx.x; i < 15 * 1024; i += blockDim.x) values[i] = static_cast<float>(i);
  __syncthreads();
  out[threadIdx.x] = values[15 * 1024 - 1 - threadIdx.x];
}

void check_large_blocks() {
  auto out = buffer<float>(1024);
  expect(cudaFuncSetAttribute(large_blocks, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 * 1024) == cudaSuccess &&
             cudaFuncSetAttribute(large_blocks, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) != cudaSuccess &&
             cudaGetLastError() == cudaErrorInvalidValue,
         "opting in to more shared memory");
  LAUNCH(large_blocks, 1, 1024, 60 * 1024, nullptr, out.get());
  for (int i = 0; i < 1024; ++i) expect(out[i] == 15 * 1024 - 1 - i, "1024 threads, 60 KB of shared memory");
}

[[maybe_unused]] __global__ void half_a_barrier(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 0;
}

// A launch that fails is told once and leaves nothing behind.
[[maybe_unused]] void check_recovery() {
  auto out = buffer<float>(32);
  LAUNCH(half_a_barrier, 1, 32, 0, nullptr, out.get());
  expect(cudaPeekAtLastError() == cudaErrorLaunchFailure && cudaGetLastError() == cudaErrorLaunchFailure, "an error");
  expect(std::strstr(scaphoid_simt_error(), "kernel half_a_barrier") != nullptr, "the name of a kernel that failed");
  expect(cudaGetLastError() == cudaSuccess, "an error told twice");
  check_reduction();
}

// Between two neighbours, the middle goes to the even one and everything else to the nearest.
template <class T, class Narrow>
void check_rounding(Narrow narrow, unsigned infinity) {
  for (unsigned bits = 0; bits < infinity; ++bits) {
    const double low = static_cast<float>(T::of_bits(bits));
    expect(narrow(low).bits == bits && narrow(-low).bits == (bits | 0x8000U), "a narrow number is not kept");
    const double step = bits == 0 ? static_cast<float>(T::of_bits(1)) : low - static_cast<float>(T::of_bits(bits - 1));
    const double high = bits + 1 < infinity ? static_cast<float>(T::of_bits(bits + 1)) : low + step;
    const double middle = low + (high - low) / 2;
    expect(narrow(middle).bits == bits + bits % 2, "a tie does not go to the even number");
    expect(narrow(std::nextafter(middle, 0)).bits == bits, "below the middle");
    expect(narrow(std::nextafter(middle, INFINITY)).bits == bits + 1, "above the middle");
  }
  expect(narrow(INFINITY).bits == infinity && narrow(-INFINITY).bits == (infinity | 0x8000U), "infinity");
  expect(std::isnan(static_cast<float>(narrow(NAN))), "NaN");
}

void check_types() {
  check_rounding<__half>([](double value) { return __double2half(value); }, 0x7C00);
  check_rounding<__nv_bfloat16>([](double value) { return __double2bfloat16(value); }, 0x7F80);
  // 1 + 2^-11 is a tie, that 2^-24 * 2^-24 decides: twice rounded, it would be even.
  const __half tiny = __float2half(std::ldexp(1.0F, -24)), almost = __float2half(1 + std::ldexp(1.0F, -10));
  expect(__half_as_ushort(__hfma(tiny, tiny, almost)) == __half_as_ushort(almost),
         "a fused sum of very unequal numbers");
  expect(alignof(float4) == 16 && alignof(__half2) == 4 && sizeof(uchar4) == 4 && sizeof(float3) == 12, "alignments");
  expect(min(NAN, 2.0F) == 2 && max(-1, 1U) == ~0U && min(3LL, 2) == 2, "min and max");
  expect(__clz(1) == 31 && __ffs(0) == 0 && __ffsll(1LL << 40) == 41 && __clzll(0) == 64 && __popcll(~0ULL) == 64 &&
             __brev(1) == 0x80000000U && __umulhi(1U << 31, 6) == 3,
         "bits");
  expect(__float2int_rn(2.5F) == 2 && __float2int_rd(-0.5F) == -1 && __float2int_rz(3e10F) == INT32_MAX, "conversions");
}

}  // namespace

int main() {
  check_types();
  for (unsigned seed = 0; seed < 10; ++seed) {
    scaphoid_simt_seed(seed);
    check_reduction();
    check_compaction();
    check_histogram();
    check_pairs();
    check_transposition();
    check_totals();
    if (seed == 0) check_shuffles();
    check_halves();
    check_places();
    check_instances();
    if (seed == 0) check_large_blocks();
    expect(cudaGetLastError() == cudaSuccess, "a launch failed");
  }
#ifndef __SANITIZE_THREAD__  // which takes the threads left behind for running ones
  check_recovery();
#endif
  return failures != 0;
}

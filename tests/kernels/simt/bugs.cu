// Kernels with one bug each, by name: `bugs NAME` must not end well. The host keeps device memory in exact mallocs.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"

namespace {

constexpr unsigned kWholeWarp = 0xffffffffU;

__global__ void missing_barrier(float* out) {
  SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// The race lies between two barriers, both of which all threads reach.
__global__ void missing_middle_barrier(float* out) {
  SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float other = values[63 - threadIdx.x];
  values[threadIdx.x] = other;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void missing_syncwarp(float* out) {
  SHARED_ARRAY(float, values, 32);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[31 - threadIdx.x];
}

// __syncwarp orders the lanes of a warp, not two warps.
__global__ void syncwarp_for_syncthreads(float* out) {
  SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// A shuffle lets lanes wait for one another, but orders nothing that they
// write.
__global__ void shuffle_for_syncwarp(float* out) {
  SHARED_ARRAY(float, values, 32);
  values[threadIdx.x] = threadIdx.x;
  const int from = __shfl_xor_sync(kWholeWarp, static_cast<int>(threadIdx.x), 1);
  out[threadIdx.x] = values[from];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void barrier_of_some(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void barrier_after_exit(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void barrier_and_shuffle(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, 1.0F, 1);
}

__global__ void caller_not_in_mask(float* out) { out[threadIdx.x] = __shfl_down_sync(0xffffU, 1.0F, 1); }

__global__ void shuffle_of_some(float* out) {
  float value = 1;
  if (threadIdx.x % 32 < 16) value = __shfl_down_sync(kWholeWarp, value, 1);
  out[threadIdx.x] = value;
}

__global__ void absent_lanes(float* out) { out[threadIdx.x] = __shfl_down_sync(kWholeWarp, 1.0F, 16); }

__global__ void lane_not_in_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffU, 1.0F, 16);
}

__global__ void masks_differ(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 2 ? kWholeWarp : 0x7fffffffU, 1.0F, 1);
}

__global__ void sites_differ(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, 1.0F, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, 1.0F, 2);
  }
}

__global__ void wrong_ballot_mask(float* out) {
  if (threadIdx.x % 32 >= 20) return;
  out[threadIdx.x] = __ballot_sync(kWholeWarp, threadIdx.x % 3 == 0);
}

__global__ void width_of_24(float* out) { out[threadIdx.x] = __shfl_down_sync(kWholeWarp, 1.0F, 1, 24); }

__global__ void widths_differ(float* out) {
  out[threadIdx.x] = __shfl_down_sync(kWholeWarp, 1.0F, 1, threadIdx.x < 16 ? 16 : 8);
}

__global__ void blocks_race(float* out) {
  if (threadIdx.x == 0) out[0] += 1;
}

// The same, where every block has been through a barrier.
__global__ void blocks_race_after_barrier(float* out) {
  const int before = __syncthreads_count(threadIdx.x > 3);
  if (threadIdx.x == 0) out[0] += before;
  __syncthreads();
}

__global__ void plain_increment(float* out) { out[0] += 1; }

__global__ void atomic_and_plain(float* out) {
  if (threadIdx.x == 0) {
    out[0] += 1;
  } else {
    atomicAdd(out, 1.0F);
  }
}

__global__ void shared_out_of_bounds(float* out) {
  SHARED_ARRAY(float, values, 64);
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void dynamic_out_of_bounds(float* out) {
  DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void global_out_of_bounds(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void misaligned_vector(float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out + 1) = make_float4(1, 2, 3, 4);
}

__global__ void uninitialised_shared(float* out) {
  SHARED_ARRAY(float, values, 64);
  if (threadIdx.x < 63) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void uninitialised_dynamic(float* out) {
  DYNAMIC_SHARED(float, values);
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void too_much_static(float* out) {
  SHARED_ARRAY(float, most, 12 * 1024);
  SHARED_ARRAY(float, last, 1);
  most[threadIdx.x] = last[0] = 0;
  out[threadIdx.x] = 0;
}

__global__ void stack_overflow(float* out) {
  volatile char large[1 << 18];
  for (int i = (1 << 18) - 1; i >= 0; --i) large[i] = 1;
  out[threadIdx.x] = large[0];
}

__global__ void nothing(float* out) { out[threadIdx.x] = 0; }

struct Bug {
  const char* name;
  void (*kernel)(float*);
  dim3 grid, block;
  size_t shared, floats;  // bytes; elements of `out`
};

#define BUG(kernel, ...) {#kernel, kernel, __VA_ARGS__}
constexpr Bug kBugs[] = {
    BUG(missing_barrier, 1, 64, 0, 64),
    BUG(missing_middle_barrier, 1, 64, 0, 64),
    BUG(missing_syncwarp, 1, 32, 0, 32),
    BUG(syncwarp_for_syncthreads, 1, 64, 0, 64),
    BUG(shuffle_for_syncwarp, 1, 32, 0, 32),
    BUG(divergent_barrier, 1, 64, 0, 64),
    BUG(barrier_of_some, 1, 64, 0, 64),
    BUG(barrier_after_exit, 1, 64, 0, 64),
    BUG(barrier_and_shuffle, 1, 32, 0, 32),
    BUG(caller_not_in_mask, 1, 32, 0, 32),
    BUG(shuffle_of_some, 1, 64, 0, 64),
    BUG(absent_lanes, 1, 20, 0, 20),
    BUG(lane_not_in_mask, 1, 32, 0, 32),
    BUG(masks_differ, 1, 32, 0, 32),
    BUG(sites_differ, 1, 32, 0, 32),
    BUG(wrong_ballot_mask, 1, 32, 0, 32),
    BUG(width_of_24, 1, 32, 0, 32),
    BUG(widths_differ, 1, 32, 0, 32),
    BUG(blocks_race, 4, 32, 0, 1),
    BUG(blocks_race_after_barrier, 4, 32, 0, 1),
    BUG(plain_increment, 1, 64, 0, 1),
    BUG(atomic_and_plain, 1, 64, 0, 1),
    BUG(shared_out_of_bounds, 1, 64, 0, 64),
    BUG(dynamic_out_of_bounds, 1, 64, 64 * sizeof(float), 64),
    BUG(global_out_of_bounds, 1, 64, 0, 64),
    BUG(misaligned_vector, 1, 32, 0, 64),
    BUG(uninitialised_shared, 1, 64, 0, 64),
    BUG(uninitialised_dynamic, 1, 64, 64 * sizeof(float), 64),
    BUG(too_much_static, 1, 32, 0, 32),
    BUG(stack_overflow, 1, 32, 0, 32),
    {"block_too_large", nothing, 1, 1025, 0, 1025},
    {"block_too_large_in_3d", nothing, 1, {32, 8, 5}, 0, 1280},
    {"block_too_deep", nothing, 1, {1, 1, 65}, 0, 65},
    {"block_of_none", nothing, 1, 0, 0, 1},
    {"grid_of_none", nothing, 0, 32, 0, 32},
    {"grid_too_high", nothing, {1, 65536}, 32, 0, 32},
    {"grid_too_deep", nothing, {1, 1, 65536}, 32, 0, 32},
    {"shared_too_large", nothing, 1, 32, 48 * 1024 + 1, 32},
};
#undef BUG

int run(const Bug& bug) {
  auto* const out = static_cast<float*>(std::calloc(bug.floats, sizeof(float)));
  // Not by LAUNCH, which would call all kernels bug.kernel.
  simt::launch(bug.name, bug.grid, bug.block, bug.shared, nullptr, bug.kernel, out);
  size_t bad = 0;
  for (size_t i = 0; i < bug.floats; ++i) bad += out[i] != out[i];
  std::free(out);
  if (bad != 0) std::fprintf(stderr, "%zu of the results are not a number\n", bad);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) std::fprintf(stderr, "%s: %s\n", cudaGetErrorName(error), cudaGetErrorString(error));
  return bad != 0 || error != cudaSuccess;
}

}  // namespace

int main(int count, char** arguments) {
  for (const Bug& bug : kBugs) {
    if (count == 2 && std::strcmp(bug.name, arguments[1]) == 0) return run(bug);
  }
  std::fprintf(stderr, "usage: bugs NAME, of a kernel in bugs.cu\n");
  return 2;
}

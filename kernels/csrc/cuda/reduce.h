// Reductions over a thread block in an order that depends on the block's size alone: the same bits on every run and
// processor. The block is one-dimensional, of whole warps, and all its threads take part.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "launch.h"

namespace scaphoid {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffU;

// The value held by the lane whose number differs from this lane's in the bits of `lanes`.
template <class T>
__device__ inline T exchange(T value, int lanes) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % sizeof(unsigned) == 0, "travels as 32-bit words");
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  unsigned words[kWords];
  memcpy(words, &value, sizeof(T));
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kWholeWarp, words[i], lanes);
  memcpy(&value, words, sizeof(T));
  return value;
}

// `combine` of one value a thread, for every thread. It must not care, bit for bit, for the order of its two arguments
// (sum, min and max of numbers do not). `scratch` is shared, one T a warp, and free again on return; what threads
// wrote to shared memory before the call can be read after it.
template <class T, class Combine>
__device__ inline T block_reduce(T value, T* scratch, Combine combine) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, exchange(value, lanes));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T result = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) result = combine(result, scratch[warp]);
  __syncthreads();
  return result;
}

// A value and where it was found; a thread that has none passes {-INFINITY, INT_MAX}.
template <class T>
struct Peak {
  T value;
  int index;
};

// Member by member: a Peak<double> has padding, which must not travel.
template <class T>
__device__ inline Peak<T> exchange(Peak<T> peak, int lanes) {
  return {exchange(peak.value, lanes), exchange(peak.index, lanes)};
}

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// The greater value; of equals the lower index. No value may be NaN.
struct First {
  template <class T>
  __device__ Peak<T> operator()(Peak<T> a, Peak<T> b) const {
    return a.value < b.value || (a.value == b.value && b.index < a.index) ? b : a;
  }
};

template <class T>
__device__ inline T block_sum(T value, T* scratch) {
  return block_reduce(value, scratch, Sum{});
}

template <class T>
__device__ inline T block_min(T value, T* scratch) {
  return block_reduce(value, scratch, Min{});
}

template <class T>
__device__ inline T block_max(T value, T* scratch) {
  return block_reduce(value, scratch, Max{});
}

template <class T>
__device__ inline Peak<T> block_argmax(Peak<T> peak, Peak<T>* scratch) {
  return block_reduce(peak, scratch, First{});
}

}  // namespace scaphoid

#include <cstdint>

#include "../scaphoid_ops.h"
#include "launch.h"
#include "reduce.h"

namespace scaphoid {
namespace {

// A cell's channels are dealt to 32 sums, channel c to sum c % 32, which a tree over a warp adds up: in both layouts,
// so that a map's bits depend on its features alone, not on their layout nor on the batch.
constexpr int kSums = kWarp;
constexpr int kCellWarps = 8;  // warps a block, each with one cell, where channels lie side by side

__device__ inline float widened(float value) { return value; }
__device__ inline double widened(double value) { return value; }
__device__ inline float widened(__half value) { return __half2float(value); }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rows of sums: the channel sum, then a class each, of which `classes` are there.
template <class Sum, int kRows>
struct Rows {
  Sum row[kRows] = {};

  // Channels first, first + 32, ... of one cell, `stride` elements apart.
  template <class Value, class Weight>
  __device__ void add(const Value* __restrict__ features, const Weight* __restrict__ weight, int first, int channels,
                      int stride, int classes) {
#pragma unroll(kRows <= 3 ? 8 : 4)
    for (int channel = first; channel < channels; channel += kSums) {
      const Sum value = widened(features[channel * stride]);
      row[0] += value;
#pragma unroll
      for (int k = 0; k + 1 < kRows; ++k) {
        if (k < classes) row[k + 1] += static_cast<Sum>(widened(weight[k * channels + channel])) * value;
      }
    }
  }

  // Adds up a warp's sums, a lane each; the first lane writes the cell's two values.
  __device__ void write(Sum* activation, Sum* class_activation) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) row[k] += exchange(row[k], lanes);
    }
    if (threadIdx.x % kWarp != 0) return;
    Sum squares = 0;
#pragma unroll
    for (int k = 1; k < kRows; ++k) squares += row[k] * row[k];
    *activation = row[0];
    *class_activation = sqrt(squares);
  }
};

// Channels are planes: a block takes kTile cells that are neighbours in memory, its threads a cell and one of its sums
// each, which change hands in shared memory: a warp then adds up those of one cell.
template <class Value, class Weight, class Sum, int kRows, int kTile>
__global__ void __launch_bounds__(kTile* kSums)
    planes_kernel(const Value* __restrict__ features, const Weight* __restrict__ weight, int channels, int cells,
                  int tiles, int classes, Sum* __restrict__ activation, Sum* __restrict__ class_activation) {
  constexpr int kPitch = kTile + 1;  // odd: the lanes of a warp read a column from 32 banks
  SHARED_ARRAY(Sum, sums, kRows * kSums * kPitch);
  const int image = blockIdx.x / tiles, start = (blockIdx.x - image * tiles) * kTile;
  const int count = min(kTile, cells - start), x = threadIdx.x % kTile, part = threadIdx.x / kTile;
  const int64_t map = static_cast<int64_t>(image) * cells + start;
  if (x < count) {
    Rows<Sum, kRows> mine;
    mine.add(features + static_cast<int64_t>(image) * channels * cells + start + x, weight, part, channels, cells,
             classes);
#pragma unroll
    for (int k = 0; k < kRows; ++k) sums[(k * kSums + part) * kPitch + x] = mine.row[k];
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int cell = threadIdx.x / kWarp; cell < count; cell += kTile * kSums / kWarp) {
    Rows<Sum, kRows> of_cell;
#pragma unroll
    for (int k = 0; k < kRows; ++k) of_cell.row[k] = sums[(k * kSums + lane) * kPitch + cell];
    of_cell.write(activation + map + cell, class_activation + map + cell);
  }
}

// Channels-last: a warp takes a cell.
template <class Value, class Weight, class Sum, int kRows>
__global__ void __launch_bounds__(kCellWarps* kWarp)
    cells_kernel(const Value* __restrict__ features, const Weight* __restrict__ weight, int channels, int cells,
                 int classes, Sum* __restrict__ activation, Sum* __restrict__ class_activation) {
  const int cell = blockIdx.x * kCellWarps + threadIdx.x / kWarp;
  if (cell >= cells) return;
  Rows<Sum, kRows> mine;
  mine.add(features + static_cast<int64_t>(cell) * channels, weight, threadIdx.x % kWarp, channels, 1, classes);
  mine.write(activation + cell, class_activation + cell);
}

template <class Value, class Weight, class Sum, int kRows>
void launch(const scaphoid_features& of, const void* features, const void* weight, void* activation,
            void* class_activation, void* stream) {
  const auto* values = static_cast<const Value*>(features);
  const auto* weights = static_cast<const Weight*>(weight);
  auto *map = static_cast<Sum*>(activation), *class_map = static_cast<Sum*>(class_activation);
  const int cells = static_cast<int>(of.h * of.w), channels = static_cast<int>(of.channels);
  const int batch = static_cast<int>(of.batch), classes = static_cast<int>(of.classes);
  if (of.channels_last) {
    const int blocks = (batch * cells + kCellWarps - 1) / kCellWarps;
    LAUNCH((cells_kernel<Value, Weight, Sum, kRows>), dim3(blocks), dim3(kCellWarps * kWarp), 0, stream, values,
           weights, channels, batch * cells, classes, map, class_map);
  } else {
    constexpr int kTile = sizeof(Value) == 2 && kRows <= 3 ? 32 : 16;  // 64 bytes a row of a tile
    const int tiles = (cells + kTile - 1) / kTile;
    LAUNCH((planes_kernel<Value, Weight, Sum, kRows, kTile>), dim3(batch * tiles), dim3(kTile * kSums), 0, stream,
           values, weights, channels, cells, tiles, classes, map, class_map);
  }
}

// Two classes are the product's; a kernel with room for more would carry eight sums through its loop for them.
template <class Value, class Weight, class Sum>
void launch(const scaphoid_features& of, const void* features, const void* weight, void* activation,
            void* class_activation, void* stream) {
  const auto run =
      of.classes <= 2 ? launch<Value, Weight, Sum, 3> : launch<Value, Weight, Sum, 1 + SCAPHOID_MAX_CLASSES>;
  run(of, features, weight, activation, class_activation, stream);
}

}  // namespace
}  // namespace scaphoid

int scaphoid_activation_maps_cuda(const scaphoid_features* of, const void* features, const void* weight,
                                  void* activation, void* class_activation, void* stream) {
  using namespace scaphoid;
  const int64_t cells = of->h * of->w;
  if (of->classes > SCAPHOID_MAX_CLASSES || cells > INT32_MAX - 64 || of->channels * cells > INT32_MAX - 64 ||
      of->batch * cells > INT32_MAX - 64) {
    return cudaErrorInvalidValue;
  }
  if (of->batch == 0) return cudaSuccess;
  const bool wide = of->weight_dtype == SCAPHOID_F32;
  const auto run = of->dtype == SCAPHOID_F64   ? launch<double, double, double>
                   : of->dtype == SCAPHOID_F32 ? launch<float, float, float>
                   : of->dtype == SCAPHOID_F16
                       ? (wide ? launch<__half, float, float> : launch<__half, __half, float>)
                       : (wide ? launch<__nv_bfloat16, float, float> : launch<__nv_bfloat16, __nv_bfloat16, float>);
  run(*of, features, weight, activation, class_activation, stream);
  return cudaGetLastError();
}

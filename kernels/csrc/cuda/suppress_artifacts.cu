#include <cstdint>

#include "../cpu/bilinear.h"
#include "../cpu/cells.h"
#include "../scaphoid_ops.h"
#include "launch.h"
#include "reduce.h"

namespace scaphoid {
namespace {

constexpr int kRun = 16;   // pixels of a row a thread: one 16-byte load and store
constexpr int kRuns = 32;  // runs beside each other in a block's tile
constexpr int kRows = 8;   // rows of the tile
constexpr int kThreads = kRuns * kRows;

struct Sizes {
  int h, w, height, width, row_tiles, column_tiles;
  float down, across;  // cells a pixel
};

// Decides as the CPU does, in double. Most pixels are so far from the limit that float settles them: its error is below
// `tolerance`, see limit_of().
struct Decision {
  const float* map;
  double limit;
  float limit_in_float, tolerance;

  __device__ float enlarged(const Sizes& of, int y, int x) const {
    const float row = cell_of(y, of.down, of.h), column = cell_of(x, of.across, of.w);
    const int top = static_cast<int>(row), left = static_cast<int>(column);
    const float *upper = map + top * of.w, *lower = map + min(top + 1, of.h - 1) * of.w;
    const int right = min(left + 1, of.w - 1);
    const float along = column - static_cast<float>(left);
    return mix(mix(upper[left], upper[right], along), mix(lower[left], lower[right], along),
               row - static_cast<float>(top));
  }

  __device__ bool dims(const Sizes& of, int y, int x) const {
    const Sample<double> row(0, of.h, y, of.height, of.h), column(0, of.w, x, of.width, of.w);
    const float *upper = map + row.low * of.w, *lower = map + row.high * of.w;
    return !(mix(mix<double>(upper[column.low], upper[column.high], column.weight),
                 mix<double>(lower[column.low], lower[column.high], column.weight), row.weight) < limit);
  }

  __device__ static float cell_of(int pixel, float cells_a_pixel, int cells) {
    const float cell = (static_cast<float>(pixel) + 0.5F) * cells_a_pixel - 0.5F;
    return fminf(fmaxf(cell, 0.0F), static_cast<float>(cells - 1));
  }
};

// With e = 2^-24 and M the largest magnitude: a cell's position errs by at most 5e times the axis' cells, which moves
// the value by twice M as much; the arithmetic adds less than 20e * M, the limit and the difference, where they are
// near M, less than 10e * M. Where float would overflow or lose bits, nothing is settled in it.
__device__ inline Decision decision(const Sizes& of, const float* map, double theta, float greatest, float largest) {
  const double limit = theta * static_cast<double>(greatest);
  const float tolerance = 16 * 0x1p-24F * static_cast<float>(of.h + of.w + 8) * largest;
  const bool in_range = largest > 1e-25F && largest < 1e35F;
  return {map, limit, static_cast<float>(limit), in_range ? tolerance : static_cast<float>(INFINITY)};
}

__global__ void __launch_bounds__(kThreads)
    suppress_artifacts_kernel(const uint8_t* __restrict__ image, const float* __restrict__ activation, Sizes of,
                              double theta, double r, uint8_t* __restrict__ suppressed) {
  SHARED_ARRAY(float, map, SCAPHOID_MAX_SIDE* SCAPHOID_MAX_SIDE);
  SHARED_ARRAY(float, float_scratch, kThreads / kWarp);
  SHARED_ARRAY(int, int_scratch, kThreads / kWarp);
  SHARED_ARRAY(uint8_t, dimmed, 256);  // the pixel value r * p for every p
  const int tile = blockIdx.x / of.column_tiles, b = tile / of.row_tiles;
  const int column_tile = blockIdx.x - tile * of.column_tiles, row_tile = tile - b * of.row_tiles;

  const float* from = activation + static_cast<int64_t>(b) * of.h * of.w;
  float greatest = -INFINITY;
  int magnitude_bits = 0;
  for (int i = threadIdx.x; i < of.h * of.w; i += kThreads) {
    const float cell = from[i];
    map[i] = cell;
    greatest = Max{}(greatest, cell);
    magnitude_bits = Max{}(magnitude_bits, static_cast<int>(magnitude_of(cell)));
  }
  static_assert(kThreads == 256, "a thread a pixel value");
  dimmed[threadIdx.x] = static_cast<uint8_t>(rint(static_cast<double>(threadIdx.x) * r));
  greatest = block_max(greatest, float_scratch);
  magnitude_bits = block_max(magnitude_bits, int_scratch);

  const int y = row_tile * kRows + threadIdx.x / kRuns, x = (column_tile * kRuns + threadIdx.x % kRuns) * kRun;
  if (y >= of.height || x >= of.width) return;
  unsigned dim = 0, unsure = 0;
  if (magnitude_bits < kNotFinite) {
    const Decision decide = decision(of, map, theta, greatest, magnitude(magnitude_bits));
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float above = decide.enlarged(of, y, x + i) - decide.limit_in_float;
      if (above >= 0) dim |= 1U << i;
      if (!(fabsf(above) > decide.tolerance)) unsure |= 1U << i;
    }
    for (; unsure != 0; unsure &= unsure - 1) {
      const int i = __ffs(static_cast<int>(unsure)) - 1;
      dim = decide.dims(of, y, x + i) ? dim | 1U << i : dim & ~(1U << i);
    }
  }

  const int64_t offset = static_cast<int64_t>(b) * of.height * of.width + y * of.width + x;
  const auto value = [&](unsigned pixel, int i) { return dim >> i & 1U ? dimmed[pixel] : pixel; };
  const bool aligned =
      (reinterpret_cast<uintptr_t>(image + offset) | reinterpret_cast<uintptr_t>(suppressed + offset)) % kRun == 0;
  if (aligned && x + kRun <= of.width) {
    const uint4 run = *reinterpret_cast<const uint4*>(image + offset);
    const auto word = [&](unsigned four, int i) {
      return value(four & 255U, i) | value(four >> 8 & 255U, i + 1) << 8 | value(four >> 16 & 255U, i + 2) << 16 |
             value(four >> 24, i + 3) << 24;
    };
    *reinterpret_cast<uint4*>(suppressed + offset) =
        make_uint4(word(run.x, 0), word(run.y, 4), word(run.z, 8), word(run.w, 12));
  } else {
    for (int i = 0; i < kRun && x + i < of.width; ++i) {
      suppressed[offset + i] = static_cast<uint8_t>(value(image[offset + i], i));
    }
  }
}

}  // namespace
}  // namespace scaphoid

int scaphoid_suppress_artifacts_cuda(const uint8_t* image, const float* activation, int64_t batch, int64_t h, int64_t w,
                                     int64_t height, int64_t width, double theta, double r, uint8_t* suppressed,
                                     void* stream) {
  using namespace scaphoid;
  if (h > SCAPHOID_MAX_SIDE || w > SCAPHOID_MAX_SIDE || height > (INT32_MAX - 512) / width) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0) return cudaSuccess;
  const auto tiles = [](int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); };
  const Sizes of{static_cast<int>(h),
                 static_cast<int>(w),
                 static_cast<int>(height),
                 static_cast<int>(width),
                 tiles(height, kRows),
                 tiles(width, kRun * kRuns),
                 static_cast<float>(static_cast<double>(h) / static_cast<double>(height)),
                 static_cast<float>(static_cast<double>(w) / static_cast<double>(width))};
  const auto blocks = static_cast<unsigned>(batch * of.row_tiles * of.column_tiles);
  LAUNCH(suppress_artifacts_kernel, dim3(blocks), dim3(kThreads), 0, stream, image, activation, of, theta, r,
         suppressed);
  return cudaGetLastError();
}

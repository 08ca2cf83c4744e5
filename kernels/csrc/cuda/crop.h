// What the kernels of crop_resize and of its backward have in common: their arguments in 32 bits, half types.
#pragma once

#include "../cpu/bilinear.h"
#include "../scaphoid_ops.h"
#include "launch.h"

namespace scaphoid {

constexpr int kCropThreads = 256;

// scaphoid_crops for a kernel: offsets within an image and within a crop fit 32 bits, those between them may not.
struct Crops {
  int64_t batch_stride;
  int channel_stride, row_stride, column_stride;
  int channels, height, width, count, size;

  explicit Crops(const scaphoid_crops& of)
      : batch_stride(of.batch_stride),
        channel_stride(static_cast<int>(of.channel_stride)),
        row_stride(static_cast<int>(of.row_stride)),
        column_stride(static_cast<int>(of.column_stride)),
        channels(static_cast<int>(of.channels)),
        height(static_cast<int>(of.height)),
        width(static_cast<int>(of.width)),
        count(static_cast<int>(of.count)),
        size(static_cast<int>(of.size)) {}

  template <class Pixel>
  __device__ const Pixel* image_of(const Pixel* images, int crop) const {
    return images + static_cast<int64_t>(crop / count) * batch_stride;
  }
  template <class Pixel>
  __device__ Pixel* crop_at(Pixel* crops, int crop) const {
    return crops + static_cast<int64_t>(crop) * (channels * size * size);
  }
};

__device__ inline float load(__half pixel) { return __half2float(pixel); }
__device__ inline float load(__nv_bfloat16 pixel) { return __bfloat162float(pixel); }
__device__ inline void store(float value, __half* out) { *out = __float2half_rn(value); }
__device__ inline void store(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

inline int tiles(int64_t length, int tile) { return static_cast<int>((length + tile - 1) / tile); }

}  // namespace scaphoid

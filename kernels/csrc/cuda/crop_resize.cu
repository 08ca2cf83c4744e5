#include "crop.h"

namespace scaphoid {
namespace {

constexpr int kLanes = 32;                          // along a row of a crop
constexpr int kRowsAtOnce = kCropThreads / kLanes;  // by one block
constexpr int kRowsPerBlock = 4 * kRowsAtOnce;      // columns are worked out once for 4 rows

// A block writes kRowsPerBlock rows of kLanes * kColumns columns, all channels; a thread kColumns neighbours, which
// fill a 32-bit word where they are narrower. `whole_words`: every such word is aligned and within its row.
template <class Pixel, class Real, int kColumns>
__global__ void __launch_bounds__(kCropThreads, 3)
    crop_resize_kernel(Crops of, const Pixel* __restrict__ images, const Real* __restrict__ boxes, bool whole_words,
                       Pixel* __restrict__ crops) {
  const int crop = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int column = (static_cast<int>(blockIdx.z) * kLanes + thread % kLanes) * kColumns;
  if (column >= of.size) return;
  const Real* box = boxes + static_cast<int64_t>(crop) * 4;
  const Pixel* image = of.image_of(images, crop);
  Pixel* out_crop = of.crop_at(crops, crop) + column;

  int low[kColumns], high[kColumns];
  Real weight[kColumns];
  for (int k = 0; k < kColumns; ++k) {
    const Sample<Real> x(box[0], box[2], min(column + k, of.size - 1), of.size, of.width);
    low[k] = x.low * of.column_stride;
    high[k] = x.high * of.column_stride;
    weight[k] = x.weight;
  }
  const Real top = box[1], bottom = box[3];
  const int first = static_cast<int>(blockIdx.y) * kRowsPerBlock, last = min(first + kRowsPerBlock, of.size);
  for (int row = first + thread / kLanes; row < last; row += kRowsAtOnce) {
    const Sample<Real> y(top, bottom, row, of.size, of.height);
    for (int c = 0; c < of.channels; ++c) {
      const Pixel* upper = image + (c * of.channel_stride + y.low * of.row_stride);
      const Pixel* lower = image + (c * of.channel_stride + y.high * of.row_stride);
      Pixel* out = out_crop + (c * of.size + row) * of.size;
      alignas(sizeof(Pixel) * kColumns) Pixel values[kColumns];
      for (int k = 0; k < kColumns; ++k) {
        const Real before = mix(load(upper[low[k]]), load(lower[low[k]]), y.weight);
        const Real after = mix(load(upper[high[k]]), load(lower[high[k]]), y.weight);
        store(mix(before, after, weight[k]), values + k);
      }
      if (kColumns > 1 && whole_words) {
        uint32_t word;
        memcpy(&word, values, sizeof(word));
        *reinterpret_cast<uint32_t*>(out) = word;
      } else {
        for (int k = 0; k < kColumns; ++k) {
          if (column + k < of.size) out[k] = values[k];
        }
      }
    }
  }
}

template <class Pixel, class Real, int kColumns>
int launch(const scaphoid_crops& of, const void* images, const void* boxes, void* crops, void* stream) {
  static_assert(kColumns == 1 || kColumns * sizeof(Pixel) == sizeof(uint32_t), "a thread's columns fill a word");
  const bool whole_words = of.size % kColumns == 0 && reinterpret_cast<uintptr_t>(crops) % sizeof(uint32_t) == 0;
  const dim3 grid(static_cast<unsigned>(of.batch * of.count), tiles(of.size, kRowsPerBlock),
                  tiles(of.size, kLanes * kColumns));
  LAUNCH((crop_resize_kernel<Pixel, Real, kColumns>), grid, kCropThreads, 0, stream, Crops(of),
         static_cast<const Pixel*>(images), static_cast<const Real*>(boxes), whole_words, static_cast<Pixel*>(crops));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace scaphoid

int scaphoid_crop_resize_cuda(const scaphoid_crops* of, scaphoid_dtype dtype, const void* image, const void* boxes,
                              void* crops, void* stream) {
  using namespace scaphoid;
  if (of->batch * of->count * of->channels == 0) return 0;
  switch (dtype) {
    case SCAPHOID_U8: return launch<uint8_t, float, 4>(*of, image, boxes, crops, stream);
    case SCAPHOID_F16: return launch<__half, float, 2>(*of, image, boxes, crops, stream);
    case SCAPHOID_BF16: return launch<__nv_bfloat16, float, 2>(*of, image, boxes, crops, stream);
    case SCAPHOID_F32: return launch<float, float, 1>(*of, image, boxes, crops, stream);
    case SCAPHOID_F64: return launch<double, double, 1>(*of, image, boxes, crops, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

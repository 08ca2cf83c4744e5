#include <algorithm>

#include "../scaphoid_ops.h"
#include "bilinear.h"
#include "half.h"

namespace scaphoid {
namespace {

// One crop's share of the gradients. Those of an image's pixel add up in order of crops, rows and columns of outputs;
// those of the box in double.
template <bool kToImage, bool kToBox, class Pixel, class Real>
void crop_gradients(const scaphoid_crops& of, const Pixel* grad, const Pixel* image, const Real* box,
                    const Sample<Real>* columns, Real* grad_image, Real* grad_box) {
  const auto size = static_cast<int32_t>(of.size), height = static_cast<int32_t>(of.height);
  BoxSlopes slopes{};
  for (int64_t c = 0; c < of.channels; ++c) {
    for (int32_t i = 0; i < size; ++i) {
      const Sample<Real> y(box[1], box[3], i, size, height);
      const Pixel* upper = image + c * of.channel_stride + y.low * of.row_stride;
      const Pixel* lower = image + c * of.channel_stride + y.high * of.row_stride;
      Real *to_upper = nullptr, *to_lower = nullptr;
      if constexpr (kToImage) {
        to_upper = grad_image + (c * of.height + y.low) * of.width;
        to_lower = grad_image + (c * of.height + y.high) * of.width;
      }
      for (int32_t j = 0; j < size; ++j, ++grad) {
        const Sample<Real>& x = columns[j];
        const Real g = load(*grad);
        if constexpr (kToImage) {
          to_upper[x.low] += g * (1 - y.weight) * (1 - x.weight);
          to_upper[x.high] += g * (1 - y.weight) * x.weight;
          to_lower[x.low] += g * y.weight * (1 - x.weight);
          to_lower[x.high] += g * y.weight * x.weight;
        }
        if constexpr (kToBox) {
          const int64_t low = x.low * of.column_stride, high = x.high * of.column_stride;
          const Corners<Real> corners{load(upper[low]), load(upper[high]), load(lower[low]), load(lower[high])};
          slopes.add(g, corners, x, y, i, j);
        }
      }
    }
  }
  if constexpr (kToBox) slopes.finish(size, grad_box);
}

template <bool kToImage, bool kToBoxes, class Pixel, class Real>
void images_gradients(const scaphoid_crops& of, const void* grad, const void* image, const void* boxes, int64_t first,
                      int64_t last, void* grad_image, void* grad_boxes, void* workspace) {
  const int64_t pixels = of.channels * of.height * of.width, outputs = of.channels * of.size * of.size;
  auto* columns = static_cast<Sample<Real>*>(workspace);
  for (int64_t b = first; b < last; ++b) {
    const Pixel* from = static_cast<const Pixel*>(image) + b * of.batch_stride;
    Real* to = nullptr;
    if constexpr (kToImage) {
      to = static_cast<Real*>(grad_image) + b * pixels;
      std::fill(to, to + pixels, Real(0));
    }
    for (int64_t crop = b * of.count; crop < (b + 1) * of.count; ++crop) {
      const Real* box = static_cast<const Real*>(boxes) + crop * 4;
      Real* to_box = kToBoxes ? static_cast<Real*>(grad_boxes) + crop * 4 : nullptr;
      if (of.channels == 0) {  // however large: nothing to read
        if constexpr (kToBoxes) std::fill(to_box, to_box + 4, Real(0));
        continue;
      }
      const auto size = static_cast<int32_t>(of.size), width = static_cast<int32_t>(of.width);
      for (int32_t j = 0; j < size; ++j) columns[j] = Sample<Real>(box[0], box[2], j, size, width);
      crop_gradients<kToImage, kToBoxes>(of, static_cast<const Pixel*>(grad) + crop * outputs, from, box, columns, to,
                                         to_box);
    }
  }
}

template <class Pixel, class Real>
void crop_backward(const scaphoid_crops& of, const void* grad, const void* image, const void* boxes, int64_t first,
                   int64_t last, void* grad_image, void* grad_boxes, void* workspace) {
  const auto run = grad_boxes == nullptr   ? images_gradients<true, false, Pixel, Real>
                   : grad_image == nullptr ? images_gradients<false, true, Pixel, Real>
                                           : images_gradients<true, true, Pixel, Real>;
  run(of, grad, image, boxes, first, last, grad_image, grad_boxes, workspace);
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_crop_resize_backward_workspace(const scaphoid_crops* of) {
  return of->channels == 0 ? 0 : of->size * sizeof(scaphoid::Sample<double>);
}

void scaphoid_crop_resize_backward_cpu(const scaphoid_crops* of, scaphoid_dtype dtype, const void* grad,
                                       const void* image, const void* boxes, int64_t first, int64_t last,
                                       void* grad_image, void* grad_boxes, void* workspace) {
  using namespace scaphoid;
  if (grad_image == nullptr && grad_boxes == nullptr) return;
  switch (dtype) {
    case SCAPHOID_F16:
      return crop_backward<Half, float>(*of, grad, image, boxes, first, last, grad_image, grad_boxes, workspace);
    case SCAPHOID_BF16:
      return crop_backward<BFloat16, float>(*of, grad, image, boxes, first, last, grad_image, grad_boxes, workspace);
    case SCAPHOID_F32:
      return crop_backward<float, float>(*of, grad, image, boxes, first, last, grad_image, grad_boxes, workspace);
    case SCAPHOID_F64:
      return crop_backward<double, double>(*of, grad, image, boxes, first, last, grad_image, grad_boxes, workspace);
    case SCAPHOID_U8: return;  // whole numbers have no gradient
  }
}

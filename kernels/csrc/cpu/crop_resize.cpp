#include <algorithm>
#include <utility>

#include "../scaphoid_ops.h"
#include "bilinear.h"

namespace scaphoid {
namespace {

// The columns that one crop reads: offsets from the start of a row, and weights.
template <class Real>
struct Columns {
  int64_t *low, *high;
  Real* weight;

  void fill(Real start, Real end, const scaphoid_crops& of) {
    for (int64_t j = 0; j < of.size; ++j) {
      const Sample<Real> x(start, end, j, of.size, of.width);
      low[j] = x.low * of.column_stride;
      high[j] = x.high * of.column_stride;
      weight[j] = x.weight;
    }
  }
};

// Image rows resampled to a crop's columns; the two last ones are kept, as neighbouring output rows share them.
template <class Pixel, class Real>
struct Rows {
  const Pixel* channel;
  const Columns<Real>& columns;
  const scaphoid_crops& of;
  Real *upper, *lower;
  int64_t in_upper = -1, in_lower = -1;

  void resample(int64_t row, Real* out) const {
    const Pixel* pixels = channel + row * of.row_stride;
    for (int64_t j = 0; j < of.size; ++j) {
      out[j] =
          mix(static_cast<Real>(pixels[columns.low[j]]), static_cast<Real>(pixels[columns.high[j]]), columns.weight[j]);
    }
  }

  void load(int64_t top, int64_t bottom) {
    if (top == in_lower) {
      std::swap(upper, lower);
      std::swap(in_upper, in_lower);
    }
    if (top != in_upper) resample(in_upper = top, upper);
    if (bottom == top) {
      std::copy(upper, upper + of.size, lower);
      in_lower = bottom;
    } else if (bottom != in_lower) {
      resample(in_lower = bottom, lower);
    }
  }
};

template <class Pixel, class Real>
void crop_rows(const scaphoid_crops& of, const Pixel* image, const Real* boxes, int64_t first, int64_t last,
               Pixel* crops, void* workspace) {
  auto* offsets = static_cast<int64_t*>(workspace);
  auto* reals = reinterpret_cast<Real*>(offsets + 2 * of.size);
  Columns<Real> columns{offsets, offsets + of.size, reals};
  for (int64_t row = first; row < last;) {
    const int64_t crop = row / of.size, begin = row % of.size, end = std::min(of.size, begin + last - row);
    const Real* box = boxes + crop * 4;
    columns.fill(box[0], box[2], of);
    for (int64_t c = 0; c < of.channels; ++c) {
      const Pixel* channel = image + (crop / of.count) * of.batch_stride + c * of.channel_stride;
      Rows<Pixel, Real> rows{channel, columns, of, reals + of.size, reals + 2 * of.size};
      Pixel* out = crops + ((crop * of.channels + c) * of.size + begin) * of.size;
      for (int64_t i = begin; i < end; ++i, out += of.size) {
        const Sample<Real> y(box[1], box[3], i, of.size, of.height);
        rows.load(y.low, y.high);
        const Real *upper = rows.upper, *lower = rows.lower;
        for (int64_t j = 0; j < of.size; ++j) store(mix(upper[j], lower[j], y.weight), out + j);
      }
    }
    row += end - begin;
  }
}

// One crop's share of the gradients. The position of output i moves by 1 - (i + 0.5) / size with the start of the box
// and by (i + 0.5) / size with its end, not at all where it is clamped. Sums run in double.
template <class Real>
void crop_gradients(const scaphoid_crops& of, const Real* grad, const Real* image, const Real* box, Real* grad_image,
                    Real* grad_box) {
  double sums[4] = {0, 0, 0, 0};
  for (int64_t c = 0; c < of.channels; ++c) {
    for (int64_t i = 0; i < of.size; ++i) {
      const Sample<Real> y(box[1], box[3], i, of.size, of.height);
      const Real* upper = image + c * of.channel_stride + y.low * of.row_stride;
      const Real* lower = image + c * of.channel_stride + y.high * of.row_stride;
      Real* to_upper = grad_image + (c * of.height + y.low) * of.width;
      Real* to_lower = grad_image + (c * of.height + y.high) * of.width;
      const double along_y = (static_cast<double>(i) + 0.5) / static_cast<double>(of.size);
      for (int64_t j = 0; j < of.size; ++j, ++grad) {
        const Sample<Real> x(box[0], box[2], j, of.size, of.width);
        const Real g = *grad, left = 1 - x.weight, above = 1 - y.weight;
        to_upper[x.low] += g * above * left;
        to_upper[x.high] += g * above * x.weight;
        to_lower[x.low] += g * y.weight * left;
        to_lower[x.high] += g * y.weight * x.weight;
        const int64_t low = x.low * of.column_stride, high = x.high * of.column_stride;
        if (!x.clamped) {
          const double along_x = (static_cast<double>(j) + 0.5) / static_cast<double>(of.size);
          const double slope = g * mix(upper[high] - upper[low], lower[high] - lower[low], y.weight);
          sums[0] += slope * (1 - along_x);
          sums[2] += slope * along_x;
        }
        if (!y.clamped) {
          const double slope = g * mix(lower[low] - upper[low], lower[high] - upper[high], x.weight);
          sums[1] += slope * (1 - along_y);
          sums[3] += slope * along_y;
        }
      }
    }
  }
  for (int64_t k = 0; k < 4; ++k) grad_box[k] = static_cast<Real>(sums[k]);
}

template <class Real>
void crop_backward(const scaphoid_crops& of, const Real* grad, const Real* image, const Real* boxes, int64_t first,
                   int64_t last, Real* grad_image, Real* grad_boxes) {
  const int64_t pixels = of.channels * of.height * of.width, outputs = of.channels * of.size * of.size;
  for (int64_t b = first; b < last; ++b) {
    std::fill(grad_image + b * pixels, grad_image + (b + 1) * pixels, Real(0));
    for (int64_t crop = b * of.count; crop < (b + 1) * of.count; ++crop) {
      crop_gradients(of, grad + crop * outputs, image + b * of.batch_stride, boxes + crop * 4, grad_image + b * pixels,
                     grad_boxes + crop * 4);
    }
  }
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_crop_resize_workspace(int64_t size) {
  return static_cast<size_t>(size) * (2 * sizeof(int64_t) + 3 * sizeof(double));
}

void scaphoid_crop_resize_cpu_u8(const scaphoid_crops* of, const uint8_t* image, const float* boxes, int64_t first,
                                 int64_t last, uint8_t* crops, void* workspace) {
  scaphoid::crop_rows(*of, image, boxes, first, last, crops, workspace);
}

void scaphoid_crop_resize_cpu_f32(const scaphoid_crops* of, const float* image, const float* boxes, int64_t first,
                                  int64_t last, float* crops, void* workspace) {
  scaphoid::crop_rows(*of, image, boxes, first, last, crops, workspace);
}

void scaphoid_crop_resize_cpu_f64(const scaphoid_crops* of, const double* image, const double* boxes, int64_t first,
                                  int64_t last, double* crops, void* workspace) {
  scaphoid::crop_rows(*of, image, boxes, first, last, crops, workspace);
}

void scaphoid_crop_resize_backward_cpu_f32(const scaphoid_crops* of, const float* grad, const float* image,
                                           const float* boxes, int64_t first, int64_t last, float* grad_image,
                                           float* grad_boxes) {
  scaphoid::crop_backward(*of, grad, image, boxes, first, last, grad_image, grad_boxes);
}

void scaphoid_crop_resize_backward_cpu_f64(const scaphoid_crops* of, const double* grad, const double* image,
                                           const double* boxes, int64_t first, int64_t last, double* grad_image,
                                           double* grad_boxes) {
  scaphoid::crop_backward(*of, grad, image, boxes, first, last, grad_image, grad_boxes);
}

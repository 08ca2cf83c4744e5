// Bilinear sampling along one axis, shared by cropping and by artefact suppression, on CPU and CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "../host_device.h"

namespace scaphoid {

// Output `index` of `size` over [start, end) of an axis of `limit` pixels (at most 2^24): half-pixel centres, clamped
// to the image. A position that is not a number reads pixel 0; `clamped` positions do not move with the interval. As
// `index` grows, positions only rise (end >= start) or only fall, also when rounded.
template <class Real>
struct Sample {
  int32_t low, high;
  Real weight;
  bool clamped;

  SCAPHOID_HD Sample(Real start, Real end, int32_t index, int32_t size, int32_t limit) {
    const Real half = Real(0.5), last = static_cast<Real>(limit - 1);
    Real position = start + (static_cast<Real>(index) + half) * (end - start) / static_cast<Real>(size) - half;
    clamped = !(position >= 0 && position <= last);
    position = position > 0 ? (position < last ? position : last) : Real(0);
    low = static_cast<int32_t>(position);
    high = low < limit - 1 ? low + 1 : low;
    weight = position - static_cast<Real>(low);
  }
};

template <class Real>
SCAPHOID_HD inline Real mix(Real a, Real b, Real weight) {
  return a + weight * (b - a);
}

// The four pixels that an output mixes.
template <class Real>
struct Corners {
  Real upper_low, upper_high, lower_low, lower_high;
};

// The gradient of a box from those of its crop's outputs: along each axis the sum of slopes and its first moment.
struct BoxSlopes {
  double x, x_moment, y, y_moment;

  // The output in row i, column j, of gradient g, read at x and y. A clamped position does not move with the box.
  template <class Real>
  SCAPHOID_HD void add(Real g, const Corners<Real>& at, const Sample<Real>& x_at, const Sample<Real>& y_at, int32_t i,
                       int32_t j) {
    if (!x_at.clamped) {
      const double slope = g * mix(at.upper_high - at.upper_low, at.lower_high - at.lower_low, y_at.weight);
      x += slope;
      x_moment += slope * (j + 0.5);
    }
    if (!y_at.clamped) {
      const double slope = g * mix(at.lower_low - at.upper_low, at.lower_high - at.upper_high, x_at.weight);
      y += slope;
      y_moment += slope * (i + 0.5);
    }
  }

  // Position i moves by 1 - (i + 0.5) / size with the start of the box, by (i + 0.5) / size with its end.
  template <class Real>
  SCAPHOID_HD void finish(int32_t size, Real* grad_box) const {
    grad_box[0] = static_cast<Real>(x - x_moment / size);
    grad_box[1] = static_cast<Real>(y - y_moment / size);
    grad_box[2] = static_cast<Real>(x_moment / size);
    grad_box[3] = static_cast<Real>(y_moment / size);
  }
};

// From the pixel type to the type of the arithmetic, and back; half types: cpu/half.h and CUDA's own. rounds half
// to even: `value` lies within a rounding error of [0, 255], so adding 1.5 * 2^23 leaves the rounded value in the low
// byte, in the default rounding mode and without a call.
SCAPHOID_HD inline float load(uint8_t pixel) { return pixel; }
SCAPHOID_HD inline float load(float pixel) { return pixel; }
SCAPHOID_HD inline double load(double pixel) { return pixel; }
SCAPHOID_HD inline void store(float value, uint8_t* out) {
  const float shifted = value + 12582912.0F;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  *out = static_cast<uint8_t>(bits);
}
SCAPHOID_HD inline void store(float value, float* out) { *out = value; }
SCAPHOID_HD inline void store(double value, double* out) { *out = value; }

}  // namespace scaphoid

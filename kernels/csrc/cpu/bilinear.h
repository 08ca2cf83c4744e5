// Bilinear sampling along one axis, shared by cropping and by artefact suppression.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace scaphoid {

// Output `index` of `size` over [start, end) of an axis of `limit` pixels: half-pixel centres, clamped to the image. A
// position that is not a number reads pixel 0; `clamped` positions do not move with the interval.
template <class Real>
struct Sample {
  int64_t low, high;
  Real weight;
  bool clamped;

  Sample(Real start, Real end, int64_t index, int64_t size, int64_t limit) {
    const Real half = Real(0.5), last = static_cast<Real>(limit - 1);
    Real position = start + (static_cast<Real>(index) + half) * (end - start) / static_cast<Real>(size) - half;
    clamped = !(position >= 0 && position <= last);
    position = position > 0 ? std::min(position, last) : Real(0);
    low = static_cast<int64_t>(position);
    high = std::min(low + 1, limit - 1);
    weight = position - static_cast<Real>(low);
  }
};

template <class Real>
inline Real mix(Real a, Real b, Real weight) {
  return a + weight * (b - a);
}

// To the pixel type; uint8 rounds half to even. `value` lies within a rounding error of [0, 255], so adding 1.5 * 2^23
// leaves the rounded value in the low byte, in the default rounding mode and without a call.
inline void store(float value, uint8_t* out) {
  const float shifted = value + 12582912.0F;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  *out = static_cast<uint8_t>(bits);
}
inline void store(float value, float* out) { *out = value; }
inline void store(double value, double* out) { *out = value; }

}  // namespace scaphoid

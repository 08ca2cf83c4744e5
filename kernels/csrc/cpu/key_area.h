// What KALM's key area is decided from, on CPU and CUDA; they differ in how they sum and search.
#pragma once

#include <math.h>

#include <cstdint>

#include "../host_device.h"

namespace scaphoid {

// Along one axis: where the marginal peaks and how wide the box is, in units of the image's side, so the centre of cell
// `i` of `n` is (i + 0.5) / n; and by how much the largest sum leads the second largest.
struct KeyAxis {
  double centre, size, lead;
  bool defined;

  SCAPHOID_HD static KeyAxis undefined() { return {0.5, 1, 0, false}; }

  SCAPHOID_HD static KeyAxis decided(int64_t peak, int64_t cells, double lead, double logit) {
    if (isnan(logit)) return undefined();
    return {(static_cast<double>(peak) + 0.5) / static_cast<double>(cells), 1 / (1 + exp(-logit)), lead, true};
  }

  // The interval around the centre, the centre moved so that it stays inside the image.
  template <class Real>
  SCAPHOID_HD void interval(int64_t pixels, Real* start, Real* end) const {
    const double half = size / 2, inside = fmin(fmax(centre, half), 1 - half);
    *start = static_cast<Real>(fmax(inside - half, 0.0) * static_cast<double>(pixels));
    *end = static_cast<Real>(fmin(inside + half, 1.0) * static_cast<double>(pixels));
  }
};

// Box and margin of a map of h x w cells whose largest magnitude is `largest`.
template <class Real>
SCAPHOID_HD inline void write_key_area(const KeyAxis& x, const KeyAxis& y, double largest, int64_t h, int64_t w,
                                       int64_t height, int64_t width, Real* box, Real* margin) {
  box[0] = box[1] = *margin = 0;
  box[2] = static_cast<Real>(width);
  box[3] = static_cast<Real>(height);
  if (!x.defined || !y.defined) return;
  x.interval(width, box, box + 2);
  y.interval(height, box + 1, box + 3);
  // Relative to the map's maximum, as an engine's error is: a sum of n cells errs by at most n times that of a cell.
  const double lead = fmin(x.lead / static_cast<double>(h), y.lead / static_cast<double>(w));
  if (largest > 0) *margin = static_cast<Real>(lead / largest);
}

}  // namespace scaphoid

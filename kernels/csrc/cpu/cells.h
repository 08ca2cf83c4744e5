// Helpers of the box ops: cells of a feature map and pixels of its image.
#pragma once

#include <cstdint>

namespace scaphoid {

// Cell (r, c) of an h x w map covers pixels [r*H/h, (r+1)*H/h) x [c*W/w, (c+1)*W/w).
struct Grid {
  int64_t h, w, height, width;

  template <class Real>
  void box(int64_t top, int64_t left, int64_t bottom, int64_t right, Real* out) const {
    out[0] = static_cast<Real>(static_cast<double>(left * width) / static_cast<double>(w));
    out[1] = static_cast<Real>(static_cast<double>(top * height) / static_cast<double>(h));
    out[2] = static_cast<Real>(static_cast<double>(right * width) / static_cast<double>(w));
    out[3] = static_cast<Real>(static_cast<double>(bottom * height) / static_cast<double>(h));
  }

  template <class Real>
  void whole_image(Real* out) const {
    box(0, 0, h, w, out);
  }
};

}  // namespace scaphoid

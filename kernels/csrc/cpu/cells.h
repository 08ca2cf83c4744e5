// What the box ops share, on the CPU and in CUDA: cells of a feature map and pixels of its image, and the threshold
// `cell >= mean` of a map. Decisions are made from the same bits on every processor.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "../host_device.h"

namespace scaphoid {

// Cell (r, c) of an h x w map covers pixels [r*H/h, (r+1)*H/h) x [c*W/w, (c+1)*W/w).
struct Grid {
  int64_t h, w, height, width;

  template <class Real>
  SCAPHOID_HD void box(int64_t top, int64_t left, int64_t bottom, int64_t right, Real* out) const {
    out[0] = static_cast<Real>(border(0, left));
    out[1] = static_cast<Real>(border(1, top));
    out[2] = static_cast<Real>(border(2, right));
    out[3] = static_cast<Real>(border(3, bottom));
  }

  template <class Real>
  SCAPHOID_HD void whole_image(Real* out) const {
    box(0, 0, h, w, out);
  }

  // Coordinate `side` (0 ... 3: x0, y0, x1, y1) of a box whose border there lies before `cell`.
  SCAPHOID_HD double border(int side, int64_t cell) const {
    const bool vertical = side % 2 == 1;
    return static_cast<double>(cell) * static_cast<double>(vertical ? height : width) /
           static_cast<double>(vertical ? h : w);
  }
};

// The order in which a map is summed: lane i takes the cells i, i + kLanes, ... in turn; then the lanes of each warp
// of 32 are added pairwise (16 apart, 8, 4, 2, 1), then the warps one after the other. A thread block of kLanes threads
// does so by nature, a CPU because its vectors like it.
constexpr int kLanes = 256;

// Overwrites the lanes.
inline double sum_of_lanes(double* lanes) {
  double sum = 0;
  for (double* warp = lanes; warp != lanes + kLanes; warp += 32) {
    for (int apart = 16; apart > 0; apart /= 2) {
      for (int i = 0; i < apart; ++i) warp[i] += warp[i + apart];
    }
    sum += warp[0];
  }
  return sum;
}

// |cell| as bits, which order as the magnitudes do, and back; from kNotFinite on it is infinite or not a number.
constexpr int32_t kNotFinite = 0x7f800000;

SCAPHOID_HD inline int32_t magnitude_of(float cell) {
  int32_t bits;
  memcpy(&bits, &cell, sizeof bits);
  return bits & 0x7fffffff;
}

SCAPHOID_HD inline float magnitude(int32_t bits) {
  float cell;
  memcpy(&cell, &bits, sizeof cell);
  return cell;
}

// What a map's mean decides: a cell is in the mask when `cell >= mean`, which is `cell >= cut` without leaving float.
struct Threshold {
  double mean = 0;
  float cut = 0;

  Threshold() = default;
  SCAPHOID_HD explicit Threshold(double of_mean) : mean(of_mean), cut(static_cast<float>(of_mean)) {
    if (static_cast<double>(cut) < mean) cut = nextafterf(cut, INFINITY);
  }
};

// The cells next to the threshold on either side.
struct Nearest {
  float above = INFINITY, below = -INFINITY;

  // Distance of the nearest cell from the mean, relative to the largest magnitude; 0 for a map of zeros.
  SCAPHOID_HD double margin(const Threshold& threshold, float largest) const {
    const double up = above - threshold.mean, down = threshold.mean - below;
    return largest > 0 ? (up < down ? up : down) / largest : 0;
  }
};

}  // namespace scaphoid

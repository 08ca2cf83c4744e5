#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "bilinear.h"
#include "vectorised.h"

namespace scaphoid {
namespace {

// Which pixels of a row stay as they are: 1 or 0.
SCAPHOID_VECTORISED void mark(const double* upper, const double* lower, double weight, double limit, int64_t width,
                              uint8_t* __restrict kept) {
  for (int64_t x = 0; x < width; ++x) kept[x] = mix(upper[x], lower[x], weight) < limit;
}

// Rows [begin, end) of one image: pixels multiplied by r where the enlarged activation is not below theta * max.
struct Suppression {
  const float* map;
  int64_t h, w, height, width;
  double limit;
  const uint8_t (*value)[256];  // of a pixel that is dimmed, and of one that is kept

  void enlarge(int64_t row, double* out) const {
    for (int64_t x = 0; x < width; ++x) {
      const Sample<double> at(0.0, static_cast<double>(w), x, width, w);
      out[x] = mix<double>(map[row * w + at.low], map[row * w + at.high], at.weight);
    }
  }

  void rows(const uint8_t* image, int64_t begin, int64_t end, uint8_t* out, double* buffer) const {
    double *upper = buffer, *lower = buffer + width;
    auto* kept = reinterpret_cast<uint8_t*>(buffer + 2 * width);
    int64_t in_upper = -1;
    for (int64_t y = begin; y < end; ++y, image += width, out += width) {
      const Sample<double> at(0.0, static_cast<double>(h), y, height, h);
      if (at.low != in_upper) {
        enlarge(in_upper = at.low, upper);
        enlarge(at.high, lower);
      }
      mark(upper, lower, at.weight, limit, width, kept);
      for (int64_t x = 0; x < width; ++x) out[x] = value[kept[x]][image[x]];  // a lookup, as edges mislead branches
    }
  }
};

}  // namespace
}  // namespace scaphoid

size_t scaphoid_suppress_artifacts_workspace(int64_t width) {
  return static_cast<size_t>(width) * (2 * sizeof(double) + 1);
}

void scaphoid_suppress_artifacts_cpu(const uint8_t* image, const float* activation, int64_t h, int64_t w,
                                     int64_t height, int64_t width, double theta, double r, int64_t first, int64_t last,
                                     uint8_t* suppressed, void* workspace) {
  uint8_t value[2][256];
  for (int p = 0; p < 256; ++p) {
    value[0][p] = static_cast<uint8_t>(std::nearbyint(p * r));
    value[1][p] = static_cast<uint8_t>(p);
  }
  for (int64_t row = first; row < last;) {
    const int64_t b = row / height, begin = row % height, end = std::min(height, begin + last - row);
    const float* map = activation + b * h * w;
    const bool finite = std::all_of(map, map + h * w, [](float cell) { return std::isfinite(cell); });
    const uint8_t* from = image + row * width;
    uint8_t* to = suppressed + row * width;
    if (finite) {
      const double limit = theta * static_cast<double>(*std::max_element(map, map + h * w));
      const scaphoid::Suppression suppression{map, h, w, height, width, limit, value};
      suppression.rows(from, begin, end, to, static_cast<double*>(workspace));
    } else {
      std::copy(from, from + (end - begin) * width, to);
    }
    row += end - begin;
  }
}

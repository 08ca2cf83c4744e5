#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "bilinear.h"

namespace scaphoid {
namespace {

// Rows [begin, end) of one image: pixels multiplied by r where the enlarged activation is not below theta * max.
struct Suppression {
  const float* map;
  int64_t h, w, height, width;
  double limit;
  const uint8_t* dimmed;  // the pixel value r * p for every p

  void enlarge(int64_t row, double* out) const {
    for (int64_t x = 0; x < width; ++x) {
      const Sample<double> at(0.0, static_cast<double>(w), x, width, w);
      out[x] = mix<double>(map[row * w + at.low], map[row * w + at.high], at.weight);
    }
  }

  void rows(const uint8_t* image, int64_t begin, int64_t end, uint8_t* out, double* buffer) const {
    double *upper = buffer, *lower = buffer + width;
    int64_t in_upper = -1;
    for (int64_t y = begin; y < end; ++y, image += width, out += width) {
      const Sample<double> at(0.0, static_cast<double>(h), y, height, h);
      if (at.low != in_upper) {
        enlarge(in_upper = at.low, upper);
        enlarge(at.high, lower);
      }
      for (int64_t x = 0; x < width; ++x) {
        out[x] = mix(upper[x], lower[x], at.weight) < limit ? image[x] : dimmed[image[x]];
      }
    }
  }
};

}  // namespace
}  // namespace scaphoid

size_t scaphoid_suppress_artifacts_workspace(int64_t width) { return static_cast<size_t>(width) * 2 * sizeof(double); }

void scaphoid_suppress_artifacts_cpu(const uint8_t* image, const float* activation, int64_t h, int64_t w,
                                     int64_t height, int64_t width, double theta, double r, int64_t first, int64_t last,
                                     uint8_t* suppressed, void* workspace) {
  uint8_t dimmed[256];
  for (int p = 0; p < 256; ++p) dimmed[p] = static_cast<uint8_t>(std::nearbyint(p * r));
  for (int64_t row = first; row < last;) {
    const int64_t b = row / height, begin = row % height, end = std::min(height, begin + last - row);
    const float* map = activation + b * h * w;
    const bool finite = std::all_of(map, map + h * w, [](float cell) { return std::isfinite(cell); });
    const uint8_t* from = image + row * width;
    uint8_t* to = suppressed + row * width;
    if (finite) {
      const double limit = theta * static_cast<double>(*std::max_element(map, map + h * w));
      const scaphoid::Suppression suppression{map, h, w, height, width, limit, dimmed};
      suppression.rows(from, begin, end, to, static_cast<double*>(workspace));
    } else {
      std::copy(from, from + (end - begin) * width, to);
    }
    row += end - begin;
  }
}

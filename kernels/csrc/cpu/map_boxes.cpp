#include <algorithm>
#include <cmath>
#include <numeric>

#include "../scaphoid_ops.h"

namespace scaphoid {
namespace {

// Mean of the corners, weighted by gamma^rank, windows ranked by falling score; equals keep their order, a score that
// is not a number ranks last. The sum of the weights is 1, so no power underflows before it is divided.
void weighted_box(const float* boxes, const float* scores, double gamma, int64_t n, int32_t* order, double* box) {
  std::iota(order, order + n, 0);
  // Insertion sort: n is 7, it is stable, and std::stable_sort allocates.
  const auto rank = [&](int32_t i) { return std::isnan(scores[i]) ? -INFINITY : static_cast<double>(scores[i]); };
  for (int64_t i = 1; i < n; ++i) {
    const int32_t moved = order[i];
    int64_t j = i;
    for (; j > 0 && rank(order[j - 1]) < rank(moved); --j) order[j] = order[j - 1];
    order[j] = moved;
  }
  double total = 0, weight = 1;
  std::fill(box, box + 4, 0.0);
  for (int64_t i = 0; i < n; ++i, weight *= gamma) {
    total += weight;
    for (int64_t k = 0; k < 4; ++k) box[k] += weight * boxes[order[i] * 4 + k];
  }
  for (int64_t k = 0; k < 4; ++k) box[k] /= total;
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_map_boxes_workspace(int64_t n) { return static_cast<size_t>(n) * sizeof(int32_t); }

void scaphoid_map_boxes_cpu(const float* boxes, const float* scores, double gamma, const float* object_boxes,
                            const int32_t* original_sizes, int64_t batch, int64_t n, int64_t height, int64_t width,
                            float* mapped, void* workspace) {
  const double sides[2] = {static_cast<double>(width), static_cast<double>(height)};
  for (int64_t b = 0; b < batch; ++b) {
    double box[4] = {0, 0, sides[0], sides[1]};  // without windows: the whole object box
    if (n > 0) {
      scaphoid::weighted_box(boxes + b * n * 4, scores + b * n, gamma, n, static_cast<int32_t*>(workspace), box);
    }
    const float* object = object_boxes + b * 4;
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t axis = k % 2;
      const double start = object[axis], extent = static_cast<double>(object[axis + 2]) - start;
      const double original = original_sizes[b * 2 + (1 - axis)];
      mapped[b * 4 + k] = static_cast<float>((start + box[k] / sides[axis] * extent) / sides[axis] * original);
    }
  }
}

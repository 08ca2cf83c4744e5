// What the window ops share, on the CPU and in CUDA: how windows overlap, how they rank.
#pragma once

#include <math.h>

#include <cstdint>

#include "../host_device.h"

namespace scaphoid {

// A window in cells: its top-left corner and its shape.
struct Window {
  int32_t top, left, h, w;
};

// How many cells windows of areas a and b may share without an IoU above the threshold. The IoU grows with them, so a
// pair of windows is judged in whole numbers, without a division.
inline int64_t allowed_overlap(int64_t a, int64_t b, double threshold) {
  const auto exceeds = [&](int64_t both) {
    return static_cast<double>(both) / static_cast<double>(a + b - both) > threshold;
  };
  const int64_t most = a < b ? a : b;
  auto allowed = static_cast<int64_t>(threshold / (1 + threshold) * static_cast<double>(a + b));
  if (allowed > most) allowed = most;
  while (exceeds(allowed)) --allowed;
  while (allowed < most && !exceeds(allowed + 1)) ++allowed;
  return allowed;
}

// Windows by falling score; equals keep their order, a score that is not a number ranks as -infinity. Looks through all
// scores for each rank: there are seven, and nothing needs to be stored.
class Ranking {
 public:
  SCAPHOID_HD Ranking(const float* scores, int32_t count) : scores_(scores), count_(count) {}

  // The window of the next rank; to be called `count` times.
  SCAPHOID_HD int32_t next() {
    int32_t best = -1;
    float best_score = 0;
    for (int32_t i = 0; i < count_; ++i) {
      const float score = scores_[i] == scores_[i] ? scores_[i] : -INFINITY;
      const bool ranked = score > last_score_ || (score == last_score_ && i <= last_);
      if (ranked || (best >= 0 && score <= best_score)) continue;
      best = i;
      best_score = score;
    }
    last_ = best;
    last_score_ = best_score;
    return best;
  }

 private:
  const float* scores_;
  int32_t count_, last_ = -1;
  float last_score_ = INFINITY;
};

// Windows [batch, n, 4] of object images of height x width, their scores [batch, n], the object boxes [batch, 4] in
// images of that same size and the originals' sizes [batch, 2].
struct ScoredWindows {
  const float *boxes, *scores;
  double gamma;
  const float* object_boxes;
  const int32_t* original_sizes;
  int32_t n;
  double per_height, per_width, total;  // 1 / height, 1 / width, sum of the weights gamma^0 ... gamma^(n - 1)

  ScoredWindows(const float* boxes, const float* scores, double gamma, const float* object_boxes,
                const int32_t* original_sizes, int64_t n, int64_t height, int64_t width)
      : boxes(boxes),
        scores(scores),
        gamma(gamma),
        object_boxes(object_boxes),
        original_sizes(original_sizes),
        n(static_cast<int32_t>(n)),
        per_height(1 / static_cast<double>(height)),
        per_width(1 / static_cast<double>(width)),
        total(0) {
    double weight = 1;
    for (int64_t i = 0; i < n; ++i, weight *= gamma) total += weight;
  }

  // Coordinate `side` (x0, y0, x1, y1) of an image's mean window, in original pixels: eq. 11 and the way back.
  SCAPHOID_HD float mapped(int64_t image, int side) const {
    const bool vertical = side % 2 == 1;
    const double per_pixel = vertical ? per_height : per_width;
    const float* object = object_boxes + image * 4 + (vertical ? 1 : 0);
    const double start = object[0], extent = static_cast<double>(object[2]) - start;
    const double original = original_sizes[image * 2 + (vertical ? 0 : 1)];
    // Without windows it is the whole object box.
    const double fraction = n > 0 ? ranked_mean(image, side) * per_pixel : static_cast<double>(side / 2);
    return static_cast<float>((start + fraction * extent) * per_pixel * original);
  }

 private:
  // Weighted by gamma^rank: from 1 on, so that no power underflows before it is divided.
  SCAPHOID_HD double ranked_mean(int64_t image, int side) const {
    const float* box = boxes + image * n * 4 + side;
    Ranking ranking(scores + image * n, n);
    double sum = 0, weight = 1;
    for (int32_t i = 0; i < n; ++i, weight *= gamma) sum += weight * static_cast<double>(box[ranking.next() * 4]);
    return sum / total;
  }
};

}  // namespace scaphoid

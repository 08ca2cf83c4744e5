#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "cells.h"
#include "vectorised.h"
#include "windows.h"

namespace scaphoid {
namespace {

int64_t positions(const int64_t* shape, int64_t h, int64_t w) { return (h - shape[0] + 1) * (w - shape[1] + 1); }

int64_t most_windows(int64_t h, int64_t w, const scaphoid_window_groups& groups) {
  int64_t most = 0;
  const int64_t* shape = groups.shapes;
  for (int64_t g = 0; g < groups.groups; ++g) {
    int64_t windows = 0;
    for (int64_t s = 0; s < groups.sizes[g]; ++s, shape += 2) windows += positions(shape, h, w);
    most = std::max(most, windows);
  }
  return most;
}

struct Range {
  float largest = 0;  // magnitude
  bool finite = true, constant = true;
};

SCAPHOID_VECTORISED Range survey(const float* map, int64_t cells) {
  int32_t largest = 0, differ = 0;
  const float first = map[0];
  for (int64_t i = 0; i < cells; ++i) {
    const int32_t found = magnitude_of(map[i]);
    largest = found > largest ? found : largest;
    differ |= map[i] != first;
  }
  return {magnitude(largest), largest < kNotFinite, differ == 0};
}

// integral[r][c] is the sum of the cells above and left of (r, c): along the rows first, then down the columns.
SCAPHOID_VECTORISED void integrate(const float* map, int64_t h, int64_t w, double* integral) {
  constexpr int kTogether = 4;  // rows whose sums do not wait for each other
  const int64_t pitch = w + 1;
  std::fill(integral, integral + pitch, 0.0);
  for (int64_t r = 0; r < h; r += kTogether) {
    double sums[kTogether] = {};
    const int count = static_cast<int>(std::min<int64_t>(kTogether, h - r));
    for (int i = 0; i < count; ++i) integral[(r + 1 + i) * pitch] = 0;
    if (count == kTogether) {
      for (int64_t c = 0; c < w; ++c) {
        for (int i = 0; i < kTogether; ++i) integral[(r + 1 + i) * pitch + c + 1] = sums[i] += map[(r + i) * w + c];
      }
    } else {
      for (int i = 0; i < count; ++i) {
        for (int64_t c = 0; c < w; ++c) integral[(r + 1 + i) * pitch + c + 1] = sums[i] += map[(r + i) * w + c];
      }
    }
  }
  for (double* row = integral + pitch; row != integral + (h + 1) * pitch; row += pitch) {
    for (int64_t c = 1; c < pitch; ++c) row[c] = row[c - pitch] + row[c];
  }
}

constexpr float kDropped = -INFINITY;  // in place of the score of a window that is no longer available

// A group's windows: their scores, in the order that settles ties (shape, then row-major).
class Group {
 public:
  Group(const int64_t* shapes, int64_t sizes, const Grid& grid, float* scores)
      : shapes_(shapes), sizes_(sizes), grid_(grid), scores_(scores) {}

  void score(const double* integral) {
    float* out = scores_;
    for (int64_t s = 0; s < sizes_; ++s) out = score_shape(integral, shapes_[2 * s], shapes_[2 * s + 1], out);
    count_ = out - scores_;
  }

  // The first of the highest scores; kDropped where no window is left.
  SCAPHOID_VECTORISED float highest() const {
    constexpr int kStep = 32;
    float lanes[kStep];
    std::fill(lanes, lanes + kStep, kDropped);
    int64_t first = 0;
    for (; first + kStep <= count_; first += kStep) {
      for (int i = 0; i < kStep; ++i) lanes[i] = scores_[first + i] > lanes[i] ? scores_[first + i] : lanes[i];
    }
    for (; first < count_; ++first) lanes[0] = std::max(lanes[0], scores_[first]);
    return *std::max_element(lanes, lanes + kStep);
  }

  // Takes the first window of this score out of the group.
  Window take(float score) {
    int64_t number = find(score);
    scores_[number] = kDropped;
    const int64_t* shape = shapes_;
    for (; number >= positions(shape, grid_.h, grid_.w); shape += 2) number -= positions(shape, grid_.h, grid_.w);
    const int64_t columns = grid_.w - shape[1] + 1;
    return {static_cast<int32_t>(number / columns), static_cast<int32_t>(number % columns),
            static_cast<int32_t>(shape[0]), static_cast<int32_t>(shape[1])};
  }

  // Drops the windows that overlap `pick` by more than the threshold. In a row of windows they stand side by side, as
  // the shared columns first grow by one a step and then shrink.
  void suppress(const Window& pick, double threshold) {
    float* scores = scores_;
    for (int64_t s = 0; s < sizes_; ++s) {
      const int64_t h = shapes_[2 * s], w = shapes_[2 * s + 1], rows = grid_.h - h + 1, columns = grid_.w - w + 1;
      const int64_t allowed = allowed_overlap(h * w, int64_t{pick.h} * pick.w, threshold);
      const int64_t last = std::min<int64_t>(pick.top + pick.h, rows);
      for (int64_t r = std::max<int64_t>(pick.top - h + 1, 0); r < last; ++r) {
        const int64_t shared_rows = std::min<int64_t>(r + h, pick.top + pick.h) - std::max<int64_t>(r, pick.top);
        const int64_t shared_columns = allowed / shared_rows + 1;  // as many are too many
        if (shared_columns > std::min<int64_t>(w, pick.w)) continue;
        const int64_t from = std::max<int64_t>(pick.left + shared_columns - w, 0);
        const int64_t to = std::min<int64_t>(pick.left + pick.w - shared_columns + 1, columns);
        if (from < to) std::fill(scores + r * columns + from, scores + r * columns + to, kDropped);
      }
      scores += rows * columns;
    }
  }

 private:
  SCAPHOID_VECTORISED float* score_shape(const double* integral, int64_t h, int64_t w, float* out) const {
    const int64_t pitch = grid_.w + 1, columns = grid_.w - w + 1;
    const double scale = 1 / static_cast<double>(h * w);
    for (int64_t r = 0; r + h <= grid_.h; ++r, out += columns) {
      const double *top = integral + r * pitch, *bottom = integral + (r + h) * pitch;
      for (int64_t c = 0; c < columns; ++c) {
        // Rounded to float before they are compared: what the caller sees is what was ordered. No negative zero.
        out[c] = static_cast<float>(((bottom[c + w] - top[c + w]) - (bottom[c] - top[c])) * scale) + 0.0F;
      }
    }
    return out;
  }

  SCAPHOID_VECTORISED int64_t find(float score) const {
    constexpr int kStep = 32;
    int64_t first = 0;
    for (; first + kStep <= count_; first += kStep) {
      int32_t found = 0;
      for (int i = 0; i < kStep; ++i) found |= scores_[first + i] == score;
      if (found != 0) break;
    }
    while (scores_[first] != score) ++first;
    return first;
  }

  const int64_t* shapes_;
  int64_t sizes_;
  Grid grid_;
  float* scores_;
  int64_t count_ = 0;
};

// The smallest difference between the scores of windows that differ (a repeated pick does not): they are ranked later.
double closest_scores(const float* boxes, const float* scores, int64_t kept) {
  double closest = INFINITY;
  for (int64_t i = 0; i < kept; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      if (std::equal(boxes + i * 4, boxes + i * 4 + 4, boxes + j * 4)) continue;
      closest = std::min(closest, std::fabs(static_cast<double>(scores[i]) - static_cast<double>(scores[j])));
    }
  }
  return closest;
}

void part_windows(const float* map, const scaphoid_window_groups& groups, const Grid& grid, int64_t kept, float* boxes,
                  float* scores, float* margin, void* workspace) {
  const Range range = survey(map, grid.h * grid.w);
  if (!range.finite) {
    for (int64_t i = 0; i < kept; ++i) grid.whole_image(boxes + i * 4);
    std::fill(scores, scores + kept, 0.0F);
    *margin = 0;
    return;
  }
  auto* integral = static_cast<double*>(workspace);
  integrate(map, grid.h, grid.w, integral);
  double nearest = INFINITY;
  const int64_t* shapes = groups.shapes;
  float *box = boxes, *score = scores;
  for (int64_t g = 0; g < groups.groups; shapes += 2 * groups.sizes[g], ++g) {
    Group group(shapes, groups.sizes[g], grid, reinterpret_cast<float*>(integral + (grid.h + 1) * (grid.w + 1)));
    if (groups.counts[g] > 0) group.score(integral);
    Window last{};
    float last_score = 0;
    for (int64_t k = 0; k < groups.counts[g]; ++k, box += 4, ++score) {
      if (const float best = group.highest(); best != kDropped) {
        last = group.take(best);
        last_score = best;
        const float second = group.highest();
        if (second != kDropped) nearest = std::min(nearest, static_cast<double>(best) - static_cast<double>(second));
        if (k + 1 < groups.counts[g]) group.suppress(last, groups.iou_threshold);
      }
      grid.box(last.top, last.left, last.top + last.h, last.left + last.w, box);
      *score = last_score;
    }
  }
  nearest = std::min(nearest, closest_scores(boxes, scores, kept));
  // Picks without a rival decide nothing: as far from flipping as windows of a positive map can be.
  const double relative = std::isinf(nearest) ? 1 : nearest / range.largest;
  *margin = range.constant ? 0.0F : static_cast<float>(relative);
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_part_windows_workspace(int64_t h, int64_t w, const scaphoid_window_groups* groups) {
  return static_cast<size_t>((h + 1) * (w + 1)) * sizeof(double) +
         static_cast<size_t>(scaphoid::most_windows(h, w, *groups)) * sizeof(float);
}

void scaphoid_part_windows_cpu(const float* activation, const scaphoid_window_groups* groups, int64_t batch, int64_t h,
                               int64_t w, int64_t height, int64_t width, float* boxes, float* scores, float* margin,
                               void* workspace) {
  int64_t kept = 0;
  for (int64_t g = 0; g < groups->groups; ++g) kept += groups->counts[g];
  const scaphoid::Grid grid{h, w, height, width};
  for (int64_t b = 0; b < batch; ++b) {
    scaphoid::part_windows(activation + b * h * w, *groups, grid, kept, boxes + b * kept * 4, scores + b * kept,
                           margin + b, workspace);
  }
}

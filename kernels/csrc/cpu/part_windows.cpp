#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "cells.h"

namespace scaphoid {
namespace {

// A window in cells: its top-left corner and its shape.
struct Window {
  int32_t top, left, h, w;
};

struct Candidate {
  Window window;
  float score;
  bool alive;
};

double iou(const Window& a, const Window& b) {
  const int64_t h = std::min(a.top + a.h, b.top + b.h) - std::max(a.top, b.top);
  const int64_t w = std::min(a.left + a.w, b.left + b.w) - std::max(a.left, b.left);
  if (h <= 0 || w <= 0) return 0;
  const int64_t both = h * w, either = int64_t{a.h} * a.w + int64_t{b.h} * b.w - both;
  return static_cast<double>(both) / static_cast<double>(either);
}

int64_t positions(const int64_t* shape, int64_t h, int64_t w) { return (h - shape[0] + 1) * (w - shape[1] + 1); }

int64_t most_candidates(int64_t h, int64_t w, const scaphoid_window_groups& groups) {
  int64_t most = 0;
  const int64_t* shape = groups.shapes;
  for (int64_t g = 0; g < groups.groups; ++g) {
    int64_t candidates = 0;
    for (int64_t s = 0; s < groups.sizes[g]; ++s, shape += 2) candidates += positions(shape, h, w);
    most = std::max(most, candidates);
  }
  return most;
}

struct Range {
  float lowest, highest;
  bool finite;

  double largest() const { return std::max(std::fabs(lowest), std::fabs(highest)); }
};

// integral[r][c] is the sum of the cells above and left of (r, c).
Range integrate(const float* map, const Grid& grid, double* integral) {
  const int64_t pitch = grid.w + 1;
  Range range{map[0], map[0], true};
  std::fill(integral, integral + pitch, 0.0);
  for (int64_t r = 0; r < grid.h; ++r) {
    double row = 0;
    double *below = integral + (r + 1) * pitch, *above = integral + r * pitch;
    below[0] = 0;
    for (int64_t c = 0; c < grid.w; ++c) {
      const float cell = map[r * grid.w + c];
      range.finite = range.finite && std::isfinite(cell);
      range.lowest = std::min(range.lowest, cell);
      range.highest = std::max(range.highest, cell);
      row += cell;
      below[c + 1] = above[c + 1] + row;
    }
  }
  return range;
}

// Every window of a group, in the order that settles ties: shape, then row-major.
int64_t list_windows(const double* integral, const Grid& grid, const int64_t* shapes, int64_t count, Candidate* out) {
  const int64_t pitch = grid.w + 1;
  const Candidate* begin = out;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t h = shapes[2 * s], w = shapes[2 * s + 1];
    const auto area = static_cast<double>(h * w);
    for (int64_t r = 0; r + h <= grid.h; ++r) {
      const double *top = integral + r * pitch, *bottom = integral + (r + h) * pitch;
      for (int64_t c = 0; c + w <= grid.w; ++c, ++out) {
        // Rounded to float before they are compared: what the caller sees is what was ordered.
        const double sum = (bottom[c + w] - top[c + w]) - (bottom[c] - top[c]);
        *out = {{static_cast<int32_t>(r), static_cast<int32_t>(c), static_cast<int32_t>(h), static_cast<int32_t>(w)},
                static_cast<float>(sum / area),
                true};
      }
    }
  }
  return out - begin;
}

// The best live candidate (the first of equals) and the score gap to the best other one: INFINITY without a rival.
const Candidate* pick(const Candidate* candidates, int64_t count, double* gap) {
  const Candidate *best = nullptr, *second = nullptr;
  for (const Candidate* it = candidates; it != candidates + count; ++it) {
    if (!it->alive) continue;
    if (best == nullptr || it->score > best->score) {
      second = best;
      best = it;
    } else if (second == nullptr || it->score > second->score) {
      second = it;
    }
  }
  *gap = second == nullptr ? INFINITY : static_cast<double>(best->score) - static_cast<double>(second->score);
  return best;
}

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
  auto* integral = static_cast<double*>(workspace);
  auto* candidates = reinterpret_cast<Candidate*>(integral + (grid.h + 1) * (grid.w + 1));
  const Range range = integrate(map, grid, integral);
  if (!range.finite) {
    for (int64_t i = 0; i < kept; ++i) grid.whole_image(boxes + i * 4);
    std::fill(scores, scores + kept, 0.0F);
    *margin = 0;
    return;
  }
  double nearest = INFINITY;
  const int64_t* shapes = groups.shapes;
  for (int64_t g = 0; g < groups.groups; shapes += 2 * groups.sizes[g], ++g) {
    const int64_t count = list_windows(integral, grid, shapes, groups.sizes[g], candidates);
    Candidate last{};
    for (int64_t k = 0; k < groups.counts[g]; ++k, boxes += 4, ++scores) {
      double gap = INFINITY;
      if (const Candidate* best = pick(candidates, count, &gap)) {
        last = *best;
        for (Candidate* it = candidates; it != candidates + count; ++it) {
          it->alive = it->alive && it != best && !(iou(it->window, last.window) > groups.iou_threshold);
        }
      }
      nearest = std::min(nearest, gap);
      const Window& window = last.window;
      grid.box(window.top, window.left, window.top + window.h, window.left + window.w, boxes);
      *scores = last.score;
    }
  }
  nearest = std::min(nearest, closest_scores(boxes - kept * 4, scores - kept, kept));
  // Picks without a rival decide nothing: as far from flipping as windows of a positive map can be.
  const double relative = std::isinf(nearest) ? 1 : nearest / range.largest();
  *margin = range.lowest == range.highest ? 0.0F : static_cast<float>(relative);
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_part_windows_workspace(int64_t h, int64_t w, const scaphoid_window_groups* groups) {
  return static_cast<size_t>((h + 1) * (w + 1)) * sizeof(double) +
         static_cast<size_t>(scaphoid::most_candidates(h, w, *groups)) * sizeof(scaphoid::Candidate);
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

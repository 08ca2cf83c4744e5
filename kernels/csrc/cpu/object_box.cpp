#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "../scaphoid_ops.h"
#include "cells.h"
#include "vectorised.h"

namespace scaphoid {
namespace {

struct Statistics {
  double sum = 0;
  float largest = 0;  // magnitude
  bool finite = true;
};

// Sum in the order of kLanes, largest magnitude.
SCAPHOID_VECTORISED Statistics survey(const float* map, int64_t cells) {
  double lanes[kLanes] = {};
  int32_t largest = 0;  // as bits, which order as magnitudes do
  for (int64_t first = 0; first < cells; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, cells - first);
    for (int64_t i = 0; i < count; ++i) lanes[i] += map[first + i];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t found = magnitude_of(map[first + i]);
      largest = found > largest ? found : largest;
    }
  }
  return {sum_of_lanes(lanes), magnitude(largest), largest < kNotFinite};
}

// Masks of a map as bits: word (r, k) holds the cells [64 k, 64 k + 64) of row r, the lowest bit first. A border of
// zero words on every side stands for the outside.
class Bits {
 public:
  static int64_t words(int64_t h, int64_t w) { return (h + 2) * ((w + 63) / 64 + 2); }

  Bits(uint64_t* words, int64_t h, int64_t w) : h(h), columns((w + 63) / 64), pitch_(columns + 2), words_(words) {
    std::fill(words, words + Bits::words(h, w), 0);
  }

  uint64_t& at(int64_t r, int64_t k) { return words_[(r + 1) * pitch_ + k + 1]; }

  // The cells of word (r, k) that are set or have a neighbour in their row that is.
  uint64_t widened(int64_t r, int64_t k) {
    const uint64_t* word = &at(r, k);
    return word[0] | word[0] << 1 | word[0] >> 1 | word[-1] >> 63 | word[1] << 63;
  }

  const int64_t h, columns;

 private:
  int64_t pitch_;
  uint64_t* words_;
};

// Marks the cells at or above the threshold, as bytes, and finds those next to it.
SCAPHOID_VECTORISED Nearest mark(const float* map, int64_t cells, const Threshold& threshold, uint8_t* marks) {
  constexpr int kStep = 32;
  float above[kStep], below[kStep];
  std::fill(above, above + kStep, INFINITY);
  std::fill(below, below + kStep, -INFINITY);
  const float cut = threshold.cut;
  const auto meet = [&](int i, int64_t cell) {
    const float value = map[cell];
    const bool in = value >= cut;
    const float up = in ? value : INFINITY, down = in ? -INFINITY : value;
    above[i] = up < above[i] ? up : above[i];
    below[i] = down > below[i] ? down : below[i];
    marks[cell] = in;
  };
  int64_t first = 0;
  for (; first + kStep <= cells; first += kStep) {
    for (int i = 0; i < kStep; ++i) meet(i, first + i);
  }
  for (; first < cells; ++first) meet(0, first);
  return {*std::min_element(above, above + kStep), *std::max_element(below, below + kStep)};
}

// Bytes of 0 or 1 `[h, w]`, and seven zeros behind them, into bits.
void pack(const uint8_t* marks, int64_t w, Bits& bits) {
  for (int64_t r = 0; r < bits.h; ++r) {
    for (int64_t k = 0; k < bits.columns; ++k) {
      const uint8_t* from = marks + r * w + k * 64;
      const int64_t count = std::min<int64_t>(w - k * 64, 64);
      uint64_t word = 0;
      for (int64_t c = 0; c < count; c += 8) {
        uint64_t eight;
        std::memcpy(&eight, from + c, 8);
        word |= (eight * 0x0102040810204080U) >> 56 << c;  // the product moves the lowest bit of byte i to bit 56 + i
      }
      bits.at(r, k) = count < 64 ? word & ((uint64_t{1} << count) - 1) : word;
    }
  }
}

// The runs of `mask` that hold a bit of `seeds`, a part of it, whole.
uint64_t runs_of(uint64_t seeds, uint64_t mask) {
  uint64_t runs = seeds | (mask & ~(mask + seeds));  // the carry runs up to each run's end
  for (int by = 1; by < 64; by *= 2) {
    runs |= mask & runs >> by;
    mask &= mask >> by;
  }
  return runs;
}

// Grows `region` by the cells of row r in the mask that touch it; whether there were any.
bool grow_row(Bits& mask, Bits& region, int64_t r, bool forward) {
  bool grew = false;
  for (int64_t i = 0; i < mask.columns; ++i) {
    const int64_t k = forward ? i : mask.columns - 1 - i;
    const uint64_t cells = mask.at(r, k);
    const uint64_t seeds = cells & (region.widened(r - 1, k) | region.widened(r, k) | region.widened(r + 1, k));
    if (seeds == region.at(r, k)) continue;  // whole runs already, or nothing
    grew = true;
    region.at(r, k) = runs_of(seeds, cells);
  }
  return grew;
}

// Rows [first, last] of a region.
struct Rows {
  int64_t first, last;
};

// Grows a region from a cell in `row` to its whole 8-connected component of the mask, sweeping down and up over the
// rows next to those that the sweep before has changed.
Rows flood(Bits& mask, Bits& region, int64_t row) {
  Rows reached{row, row}, changed{row, row};
  for (bool down = true; changed.first <= changed.last; down = !down) {
    int64_t first = std::max<int64_t>(changed.first - 1, 0), last = std::min(changed.last + 1, mask.h - 1);
    changed = {mask.h, -1};
    for (int64_t r = down ? first : last; r >= first && r <= last; r += down ? 1 : -1) {
      if (!grow_row(mask, region, r, down)) continue;
      changed = {std::min(changed.first, r), std::max(changed.last, r)};
      if (down) last = std::min(std::max(last, r + 1), mask.h - 1);
      if (!down) first = std::max<int64_t>(std::min(first, r - 1), 0);
    }
    reached = {std::min(reached.first, changed.first), std::max(reached.last, changed.last)};
  }
  return reached;
}

// Bounding box in cells; empty while bottom is 0.
struct Bounds {
  int64_t top, left, bottom, right;
};

Bounds bounds_of_both(Bits& a, Bits& b, const Rows& rows) {
  Bounds bounds{INT64_MAX, INT64_MAX, 0, 0};
  for (int64_t r = rows.first; r <= rows.last; ++r) {
    for (int64_t k = 0; k < a.columns; ++k) {
      const uint64_t both = a.at(r, k) & b.at(r, k);
      if (both == 0) continue;
      bounds.top = std::min(bounds.top, r);
      bounds.bottom = r + 1;
      bounds.left = std::min<int64_t>(bounds.left, k * 64 + std::countr_zero(both));
      bounds.right = std::max<int64_t>(bounds.right, k * 64 + 64 - std::countl_zero(both));
    }
  }
  return bounds;
}

// Takes the region out of the mask, clears it and returns how many cells it had.
int64_t take_out(Bits& mask, Bits& region, const Rows& rows) {
  int64_t cells = 0;
  for (int64_t r = rows.first; r <= rows.last; ++r) {
    for (int64_t k = 0; k < mask.columns; ++k) {
      cells += std::popcount(region.at(r, k));
      mask.at(r, k) &= ~region.at(r, k);
      region.at(r, k) = 0;
    }
  }
  return cells;
}

// Bounds of the class mask's cells within the mask's largest component. Components are met in the row-major order of
// their first cells, so the strict comparison settles ties as specified. Empties the mask as it goes, and stops when
// what is left of it could not be larger.
SCAPHOID_VECTORISED Bounds largest_component(Bits& mask, Bits& region, Bits& class_mask) {
  int64_t left = 0, most = 0;
  for (int64_t r = 0; r < mask.h; ++r) {
    for (int64_t k = 0; k < mask.columns; ++k) left += std::popcount(mask.at(r, k));
  }
  Bounds best{0, 0, 0, 0};
  for (int64_t r = 0; r < mask.h; ++r) {
    for (int64_t k = 0; k < mask.columns; ++k) {
      while (left > most && mask.at(r, k) != 0) {
        region.at(r, k) = mask.at(r, k) & -mask.at(r, k);
        const Rows rows = flood(mask, region, r);
        const Bounds bounds = bounds_of_both(region, class_mask, rows);
        const int64_t cells = take_out(mask, region, rows);
        left -= cells;
        if (cells <= most) continue;
        most = cells;
        best = bounds;
      }
    }
  }
  return best;
}

void object_box(const float* activation, const float* class_activation, const Grid& grid, float* box, float* margin,
                uint64_t* workspace) {
  const int64_t cells = grid.h * grid.w;
  grid.whole_image(box);
  *margin = 0;
  const Statistics object = survey(activation, cells), of_class = survey(class_activation, cells);
  if (!object.finite || !of_class.finite) return;

  const Threshold threshold(object.sum / static_cast<double>(cells));
  const Threshold class_threshold(of_class.sum / static_cast<double>(cells));
  const int64_t words = Bits::words(grid.h, grid.w);
  Bits mask(workspace, grid.h, grid.w), class_mask(workspace + words, grid.h, grid.w);
  Bits region(workspace + 2 * words, grid.h, grid.w);
  auto* marks = reinterpret_cast<uint8_t*>(workspace + 3 * words);
  std::memset(marks + cells, 0, 8);
  const Nearest nearest = mark(activation, cells, threshold, marks);
  pack(marks, grid.w, mask);
  const Nearest class_nearest = mark(class_activation, cells, class_threshold, marks);
  pack(marks, grid.w, class_mask);
  *margin = static_cast<float>(
      std::min(nearest.margin(threshold, object.largest), class_nearest.margin(class_threshold, of_class.largest)));

  const Bounds bounds = largest_component(mask, region, class_mask);
  if (bounds.bottom > 0) grid.box(bounds.top, bounds.left, bounds.bottom, bounds.right, box);
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_object_box_workspace(int64_t h, int64_t w) {
  return static_cast<size_t>(scaphoid::Bits::words(h, w)) * 3 * sizeof(uint64_t) + static_cast<size_t>(h * w) + 8;
}

void scaphoid_object_box_cpu(const float* activation, const float* class_activation, int64_t batch, int64_t h,
                             int64_t w, int64_t height, int64_t width, float* boxes, float* margin, void* workspace) {
  const scaphoid::Grid grid{h, w, height, width};
  for (int64_t b = 0; b < batch; ++b) {
    scaphoid::object_box(activation + b * h * w, class_activation + b * h * w, grid, boxes + b * 4, margin + b,
                         static_cast<uint64_t*>(workspace));
  }
}

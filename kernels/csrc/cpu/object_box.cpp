#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "cells.h"

namespace scaphoid {
namespace {

// Mean and largest magnitude of a map, and how near its nearest cell is to the threshold `cell >= mean`.
struct Threshold {
  double mean = 0, margin = 0;
  bool finite = true;

  Threshold(const float* map, int64_t cells) {
    double sum = 0, largest = 0;
    for (int64_t i = 0; i < cells; ++i) {
      finite = finite && std::isfinite(map[i]);
      sum += map[i];
      largest = std::max(largest, std::fabs(static_cast<double>(map[i])));
    }
    mean = sum / static_cast<double>(cells);
    if (!finite || largest == 0) return;
    double nearest = INFINITY;
    for (int64_t i = 0; i < cells; ++i) nearest = std::min(nearest, std::fabs(map[i] - mean));
    margin = nearest / largest;
  }
};

// The 8-connected region that holds `seed`, marked with `label` in `labels`, where unvisited cells of the mask are 1.
// Returns its number of cells; `stack` needs one entry a cell, as a cell is marked when it is pushed.
int64_t fill(int32_t* labels, const Grid& grid, int32_t seed, int32_t label, int32_t* stack) {
  int64_t depth = 0, cells = 0;
  labels[seed] = label;
  stack[depth++] = seed;
  while (depth > 0) {
    const int64_t cell = stack[--depth], row = cell / grid.w, column = cell % grid.w;
    ++cells;
    for (int64_t r = std::max<int64_t>(row - 1, 0); r <= std::min(row + 1, grid.h - 1); ++r) {
      for (int64_t c = std::max<int64_t>(column - 1, 0); c <= std::min(column + 1, grid.w - 1); ++c) {
        const auto neighbour = static_cast<int32_t>(r * grid.w + c);
        if (labels[neighbour] != 1) continue;
        labels[neighbour] = label;
        stack[depth++] = neighbour;
      }
    }
  }
  return cells;
}

// Labels the mask `map >= mean` (0 outside it) and returns the label of the largest component. Components are met in
// the row-major order of their first cells, so the strict comparison settles ties as specified.
int32_t largest_component(const float* map, double mean, const Grid& grid, int32_t* labels, int32_t* stack) {
  const int64_t cells = grid.h * grid.w;
  for (int64_t i = 0; i < cells; ++i) labels[i] = map[i] >= mean;
  int32_t label = 1, best = 0;
  int64_t most = 0;
  for (int64_t i = 0; i < cells; ++i) {
    if (labels[i] != 1) continue;
    const int64_t size = fill(labels, grid, static_cast<int32_t>(i), ++label, stack);
    if (size > most) {
      most = size;
      best = label;
    }
  }
  return best;
}

void object_box(const float* activation, const float* class_activation, const Grid& grid, float* box, float* margin,
                int32_t* labels) {
  const int64_t cells = grid.h * grid.w;
  grid.whole_image(box);
  *margin = 0;
  const Threshold object(activation, cells), of_class(class_activation, cells);
  if (!object.finite || !of_class.finite) return;
  *margin = static_cast<float>(std::min(object.margin, of_class.margin));

  const int32_t label = largest_component(activation, object.mean, grid, labels, labels + cells);
  int64_t top = grid.h, left = grid.w, bottom = 0, right = 0;
  for (int64_t i = 0; i < cells; ++i) {
    if (labels[i] != label || !(class_activation[i] >= of_class.mean)) continue;
    const int64_t row = i / grid.w, column = i % grid.w;
    top = std::min(top, row);
    left = std::min(left, column);
    bottom = std::max(bottom, row + 1);
    right = std::max(right, column + 1);
  }
  if (bottom > 0) grid.box(top, left, bottom, right, box);
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_object_box_workspace(int64_t h, int64_t w) { return static_cast<size_t>(h * w) * 2 * sizeof(int32_t); }

void scaphoid_object_box_cpu(const float* activation, const float* class_activation, int64_t batch, int64_t h,
                             int64_t w, int64_t height, int64_t width, float* boxes, float* margin, void* workspace) {
  const scaphoid::Grid grid{h, w, height, width};
  for (int64_t b = 0; b < batch; ++b) {
    scaphoid::object_box(activation + b * h * w, class_activation + b * h * w, grid, boxes + b * 4, margin + b,
                         static_cast<int32_t*>(workspace));
  }
}

#include <climits>

#include "../cpu/cells.h"
#include "../scaphoid_ops.h"
#include "reduce.h"

namespace scaphoid {
namespace {

constexpr int kWarps = kLanes / kWarp;
constexpr int kMostCells = SCAPHOID_MAX_SIDE * SCAPHOID_MAX_SIDE;

using Row = unsigned long long;  // a row of a mask, a bit a cell

// What is summed up of the two maps: of the activation first.
struct Surveys {
  double sum[2];
  int largest[2];  // magnitudes, as bits

  __device__ void add(int map, float cell) {
    sum[map] += cell;
    largest[map] = max(largest[map], magnitude_of(cell));
  }
};

struct MergeSurveys {
  __device__ Surveys operator()(const Surveys& a, const Surveys& b) const {
    return {{a.sum[0] + b.sum[0], a.sum[1] + b.sum[1]},
            {max(a.largest[0], b.largest[0]), max(a.largest[1], b.largest[1])}};
  }
};

struct NearestOfBoth {
  Nearest of[2];
};

struct MergeNearest {
  __device__ NearestOfBoth operator()(const NearestOfBoth& a, const NearestOfBoth& b) const {
    NearestOfBoth nearest;
    for (int i = 0; i < 2; ++i) {
      nearest.of[i] = {fminf(a.of[i].above, b.of[i].above), fmaxf(a.of[i].below, b.of[i].below)};
    }
    return nearest;
  }
};

// Bounding box in cells; empty while bottom is 0.
struct Bounds {
  int top, left, bottom, right;
};

struct MergeBounds {
  __device__ Bounds operator()(const Bounds& a, const Bounds& b) const {
    return {min(a.top, b.top), min(a.left, b.left), max(a.bottom, b.bottom), max(a.right, b.right)};
  }
};

// A stretch of a row of the mask, as long as it can be.
struct Run {
  int row, first, length;

  __device__ Row bits() const { return (length < 64 ? (Row{1} << length) - 1 : ~Row{0}) << first; }

  // The run of `bits`, a row's mask, that holds `column`.
  __device__ static Run at(Row bits, int row, int column) {
    const Row below = ~bits & ((Row{1} << column) - 1), from = ~(bits >> column);
    const int first = 64 - __clzll(static_cast<long long>(below));
    const int end = from == 0 ? 64 : column + __ffsll(static_cast<long long>(from)) - 1;
    return {row, first, end - first};
  }
};

// Calls visit(run) for every run of the mask [h]: a warp a row, a lane the columns where a run may start.
template <class Visit>
__device__ inline void for_each_run(const Row* mask, int h, int w, Visit visit) {
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < h; r += kWarps) {
    const Row bits = mask[r], starts = bits & ~(bits << 1);
    for (int c = static_cast<int>(threadIdx.x) % kWarp; c < w; c += kWarp) {
      if (starts >> c & 1) visit(Run::at(bits, r, c));
    }
  }
}

// Components as trees over the first cells of runs: parents[cell] <= cell, and a root is its own parent, so that the
// root is the component's first cell in row-major order once all unions are done.
__device__ inline int root_of(const int* parents, int cell) {
  while (parents[cell] != cell) cell = parents[cell];
  return cell;
}

// The same while other threads unite: reads with an atomic that changes nothing.
__device__ inline int root_meanwhile(int* parents, int cell) {
  for (int parent = atomicMin(parents + cell, cell); parent != cell; parent = atomicMin(parents + cell, cell)) {
    cell = parent;
  }
  return cell;
}

// Every step lowers a parent or ends, so it does end.
__device__ inline void unite(int* parents, int a, int b) {
  while (true) {
    a = root_meanwhile(parents, a);
    b = root_meanwhile(parents, b);
    if (a == b) return;
    const int lower = min(a, b), upper = max(a, b);
    const int before = atomicMin(parents + upper, lower);
    if (before == upper) return;  // it was a root still
    a = before;                   // another thread has hung it elsewhere: that tree and ours belong together
    b = lower;
  }
}

// Unites a run with those of the row above that it touches, corners included.
__device__ inline void unite_with_row_above(const Row* mask, int w, const Run& run, int* parents) {
  if (run.row == 0) return;
  const Row bits = run.bits(), above = mask[run.row - 1];
  for (Row touching = above & (bits | bits << 1 | bits >> 1); touching != 0;) {
    const int column = __ffsll(static_cast<long long>(touching)) - 1;
    const Run upper = Run::at(above, run.row - 1, column);
    unite(parents, upper.row * w + upper.first, run.row * w + run.first);
    touching &= ~upper.bits();
  }
}

// Bits [h] of `cell >= cut`, a warp a row; finds the cells next to the threshold.
__device__ inline Nearest mark(const float* map, int h, int w, float cut, Row* mask) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Nearest nearest;
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < h; r += kWarps) {
    Row bits = 0;
    for (int first = 0; first < w; first += kWarp) {
      const bool inside = first + lane < w;
      const float cell = inside ? map[r * w + first + lane] : 0;
      const bool in = inside && cell >= cut;
      if (in) nearest.above = fminf(nearest.above, cell);
      if (inside && !in) nearest.below = fmaxf(nearest.below, cell);
      bits |= Row{__ballot_sync(kWholeWarp, in)} << first;
    }
    if (lane == 0) mask[r] = bits;
  }
  return nearest;
}

// Cells of the class mask within the mask's largest component, of equals the first. `parents` and `sizes` have room for
// an int a cell; parents[i] = i and sizes[i] = 0 at first.
__device__ inline Bounds largest_component(const Row* mask, const Row* class_mask, int h, int w, int* parents,
                                           int* sizes, int* best_of_warps, Bounds* bounds_of_warps) {
  for_each_run(mask, h, w, [=](const Run& run) { unite_with_row_above(mask, w, run, parents); });
  __syncthreads();
  for_each_run(mask, h, w,
               [=](const Run& run) { atomicAdd(sizes + root_of(parents, run.row * w + run.first), run.length); });
  __syncthreads();
  int best = 0;  // size first, then the lower cell
  for_each_run(mask, h, w, [=, &best](const Run& run) {
    const int cell = run.row * w + run.first;
    if (parents[cell] == cell) best = max(best, sizes[cell] * kMostCells + (kMostCells - 1 - cell));
  });
  best = block_max(best, best_of_warps);
  const int root = kMostCells - 1 - best % kMostCells;
  Bounds bounds{INT_MAX, INT_MAX, 0, 0};
  for_each_run(mask, h, w, [=, &bounds](const Run& run) {
    const Row both = run.bits() & class_mask[run.row];
    if (both == 0 || root_of(parents, run.row * w + run.first) != root) return;
    const int left = __ffsll(static_cast<long long>(both)) - 1, right = 64 - __clzll(static_cast<long long>(both));
    bounds = MergeBounds{}(bounds, {run.row, left, run.row + 1, right});
  });
  return block_reduce(bounds, bounds_of_warps, MergeBounds{});
}

// One block an image.
__global__ void __launch_bounds__(kLanes)
    object_box_kernel(const float* activation, const float* class_activation, Grid grid, float* boxes, float* margins) {
  SHARED_ARRAY(Surveys, surveys_of_warps, kWarps);
  SHARED_ARRAY(NearestOfBoth, nearest_of_warps, kWarps);
  SHARED_ARRAY(Bounds, bounds_of_warps, kWarps);
  SHARED_ARRAY(int, best_of_warps, kWarps);
  SHARED_ARRAY(Row, mask, SCAPHOID_MAX_SIDE);
  SHARED_ARRAY(Row, class_mask, SCAPHOID_MAX_SIDE);
  DYNAMIC_SHARED(int, parents);
  const int h = static_cast<int>(grid.h), w = static_cast<int>(grid.w), cells = h * w;
  const int thread = static_cast<int>(threadIdx.x);
  int* const sizes = parents + cells;
  const float* const map = activation + size_t{blockIdx.x} * cells;
  const float* const class_map = class_activation + size_t{blockIdx.x} * cells;

  Surveys surveys{{0, 0}, {0, 0}};
  for (int i = thread; i < cells; i += kLanes) {
    surveys.add(0, map[i]);
    surveys.add(1, class_map[i]);
    parents[i] = i;
    sizes[i] = 0;
  }
  surveys = block_reduce(surveys, surveys_of_warps, MergeSurveys{});
  const bool finite = surveys.largest[0] < kNotFinite && surveys.largest[1] < kNotFinite;

  Bounds bounds{0, 0, 0, 0};
  double margin = 0;
  if (finite) {  // the same for the whole block
    const Threshold threshold(surveys.sum[0] / cells), class_threshold(surveys.sum[1] / cells);
    NearestOfBoth nearest{
        {mark(map, h, w, threshold.cut, mask), mark(class_map, h, w, class_threshold.cut, class_mask)}};
    nearest = block_reduce(nearest, nearest_of_warps, MergeNearest{});
    margin = min(nearest.of[0].margin(threshold, magnitude(surveys.largest[0])),
                 nearest.of[1].margin(class_threshold, magnitude(surveys.largest[1])));
    bounds = largest_component(mask, class_mask, h, w, parents, sizes, best_of_warps, bounds_of_warps);
  }
  if (bounds.bottom == 0) bounds = {0, 0, h, w};
  if (thread < 4) {
    const int before = thread == 0   ? bounds.left
                       : thread == 1 ? bounds.top
                       : thread == 2 ? bounds.right
                                     : bounds.bottom;
    boxes[size_t{blockIdx.x} * 4 + thread] = static_cast<float>(grid.border(thread, before));
  }
  if (thread == 0) margins[blockIdx.x] = static_cast<float>(margin);
}

}  // namespace
}  // namespace scaphoid

int scaphoid_object_box_cuda(const float* activation, const float* class_activation, int64_t batch, int64_t h,
                             int64_t w, int64_t height, int64_t width, float* boxes, float* margin, void* stream) {
  if (h > SCAPHOID_MAX_SIDE || w > SCAPHOID_MAX_SIDE || batch > INT_MAX) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const scaphoid::Grid grid{h, w, height, width};
  LAUNCH(scaphoid::object_box_kernel, static_cast<unsigned>(batch), scaphoid::kLanes,
         static_cast<size_t>(h * w) * 2 * sizeof(int), stream, activation, class_activation, grid, boxes, margin);
  return cudaGetLastError();
}

#include <climits>

#include "../cpu/cells.h"
#include "../cpu/windows.h"
#include "../scaphoid_ops.h"
#include "reduce.h"

namespace scaphoid {
namespace {

constexpr int kWarps = kLanes / kWarp;
constexpr int kMostCells = SCAPHOID_MAX_SIDE * SCAPHOID_MAX_SIDE;

struct Shape {
  int h, w;
  int columns, positions;  // where a window of this shape can stand
  unsigned per_columns;    // i / columns is i * per_columns >> kDivide
  double scale;            // 1 / cells of a window
};

// Exact for i < 4096 and divisors up to 64: the error i * divisor of the product stays below 2^18.
constexpr int kDivide = 18;

// The groups as the kernel takes them, by value. Shapes of all groups are numbered through.
struct Table {
  Shape shapes[SCAPHOID_MAX_SHAPES];
  int first_shape[SCAPHOID_MAX_GROUPS + 1], counts[SCAPHOID_MAX_GROUPS];
  int groups, kept;
  // Cells that a window of a shape [second] may share with a pick [first] of its group and stay. Less than all of them
  // within a shape, so that a pick itself goes.
  unsigned short allowed[SCAPHOID_MAX_SHAPES][SCAPHOID_MAX_SHAPES];
};

bool fits(const scaphoid_window_groups& groups) {
  int64_t shapes = 0, kept = 0;
  if (groups.groups > SCAPHOID_MAX_GROUPS) return false;
  for (int64_t g = 0; g < groups.groups; ++g) {
    if (groups.sizes[g] > SCAPHOID_MAX_SHAPES || groups.counts[g] > SCAPHOID_MAX_WINDOWS) return false;
    shapes += groups.sizes[g];
    kept += groups.counts[g];
  }
  return shapes <= SCAPHOID_MAX_SHAPES && kept <= SCAPHOID_MAX_WINDOWS;
}

Table table_of(const scaphoid_window_groups& groups, int h, int w) {
  Table table{};
  int shapes = 0;
  for (int g = 0; g < groups.groups; ++g) {
    const int first = table.first_shape[g] = shapes;
    for (; shapes < first + groups.sizes[g]; ++shapes) {
      const auto rows = static_cast<int>(groups.shapes[2 * shapes]),
                 cols = static_cast<int>(groups.shapes[2 * shapes + 1]);
      const int columns = w - cols + 1;
      table.shapes[shapes] = {rows,
                              cols,
                              columns,
                              (h - rows + 1) * columns,
                              (1U << kDivide) / columns + 1,
                              1 / static_cast<double>(rows * cols)};
      for (int other = first; other <= shapes; ++other) {
        const int area = rows * cols, other_area = table.shapes[other].h * table.shapes[other].w;
        const auto allowed = static_cast<int>(allowed_overlap(area, other_area, groups.iou_threshold));
        table.allowed[shapes][other] = table.allowed[other][shapes] =
            static_cast<unsigned short>(other == shapes ? min(allowed, area - 1) : allowed);
      }
    }
    table.counts[g] = static_cast<int>(groups.counts[g]);
    table.kept += table.counts[g];
  }
  table.groups = static_cast<int>(groups.groups);
  table.first_shape[table.groups] = shapes;
  return table;
}

// Between rows of the integral: odd, so that a warp that walks down a column meets all banks.
__host__ __device__ constexpr int pitch_of(int w) { return (w + 1) | 1; }

struct Range {
  int largest;  // magnitude, as bits
  int differs;  // whether any cell differs from the first
};

struct MergeRanges {
  __device__ Range operator()(const Range& a, const Range& b) const {
    return {max(a.largest, b.largest), a.differs | b.differs};
  }
};

// A window's place in the order of choice, as one number: its score, then shape, then row-major position. 0: none.
using Key = unsigned long long;

__device__ inline Key key_of(float score, int shape, int position) {
  unsigned bits;
  memcpy(&bits, &score, sizeof bits);
  bits = bits & 0x80000000U ? ~bits : bits | 0x80000000U;
  return Key{bits} << 32 | ~static_cast<unsigned>(shape * kMostCells + position);
}

__device__ inline float score_of(Key key) {
  auto bits = static_cast<unsigned>(key >> 32);
  bits = bits & 0x80000000U ? bits & 0x7fffffffU : ~bits;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

__device__ inline int number_of(Key key) { return static_cast<int>(~static_cast<unsigned>(key)); }

struct Best {
  Key first, second;
};

struct MergeBest {
  __device__ Best operator()(const Best& a, const Best& b) const {
    return {max(a.first, b.first), max(min(a.first, b.first), max(a.second, b.second))};
  }
};

struct Pick {
  Window window;
  int shape;
  float score;
};

__device__ inline bool same(const Window& a, const Window& b) {
  return a.top == b.top && a.left == b.left && a.h == b.h && a.w == b.w;
}

__device__ inline int shared_cells(const Window& a, const Window& b) {
  const int rows = min(a.top + a.h, b.top + b.h) - max(a.top, b.top);
  const int columns = min(a.left + a.w, b.left + b.w) - max(a.left, b.left);
  return rows > 0 && columns > 0 ? rows * columns : 0;
}

// integral[r][c] is the sum of the cells above and left of (r, c): along the rows first, then down the columns. Expects
// cell (r, c) in integral[r + 1][c + 1] and zeros in the first row and column.
__device__ inline void integrate(double* integral, int h, int w, int pitch) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < h) {
    double* row = integral + (thread + 1) * pitch;
    double sum = 0;
    for (int c = 1; c <= w; ++c) row[c] = sum += row[c];
  }
  __syncthreads();
  if (thread < w) {
    double* column = integral + thread + 1;
    double sum = 0;
    for (int r = 1; r <= h; ++r) column[r * pitch] = sum += column[r * pitch];
  }
  __syncthreads();
}

// Copies the map into the integral's cells, a warp a row.
__device__ inline Range load(const float* map, int h, int w, int pitch, double* integral) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  Range range{0, 0};
  const float first = map[0];
  for (int r = warp; r <= h; r += kWarps) {
    for (int c = lane; c <= w; c += kWarp) {
      const float cell = r > 0 && c > 0 ? map[(r - 1) * w + c - 1] : 0;
      integral[r * pitch + c] = static_cast<double>(cell);
      if (r == 0 || c == 0) continue;
      range.largest = max(range.largest, magnitude_of(cell));
      range.differs |= cell != first;
    }
  }
  return range;
}

// This thread's best two of a group's windows that `picks` leave.
__device__ inline Best choose(const Table& table, int group, const Pick* picks, int picked, const double* integral,
                              int pitch) {
  Best best{0, 0};
  for (int s = table.first_shape[group]; s < table.first_shape[group + 1]; ++s) {
    const Shape& shape = table.shapes[s];
    for (int i = static_cast<int>(threadIdx.x); i < shape.positions; i += kLanes) {
      const int row = static_cast<int>(i * shape.per_columns >> kDivide), column = i - row * shape.columns;
      const Window window{row, column, shape.h, shape.w};
      bool stays = true;
      for (int p = 0; p < picked; ++p) {
        stays = stays && shared_cells(window, picks[p].window) <= table.allowed[picks[p].shape][s];
      }
      if (!stays) continue;
      const double *top = integral + row * pitch + column, *bottom = top + shape.h * pitch;
      const double sum = (bottom[shape.w] - top[shape.w]) - (bottom[0] - top[0]);
      best = MergeBest{}(best, {key_of(static_cast<float>(sum * shape.scale) + 0.0F, s, i), 0});
    }
  }
  return best;
}

// The smallest difference between the scores of picks that differ, of those that fall to this thread.
__device__ inline double closest_scores(const Pick* picks, int kept) {
  double closest = INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < kept; i += kLanes) {
    for (int j = 0; j < i; ++j) {
      if (same(picks[i].window, picks[j].window)) continue;
      closest = min(closest, fabs(static_cast<double>(picks[i].score) - static_cast<double>(picks[j].score)));
    }
  }
  return closest;
}

// Fills picks [kept]; returns the smallest gap between a pick and the best other window then available.
__device__ inline double pick_all(const Table& table, const double* integral, int pitch, Pick* picks,
                                  Best* best_of_warps) {
  double nearest = INFINITY;
  for (int group = 0; group < table.groups; ++group) {
    for (int k = 0; k < table.counts[group]; ++k) {
      const Best best = block_reduce(choose(table, group, picks, k, integral, pitch), best_of_warps, MergeBest{});
      if (threadIdx.x == 0) {
        if (best.first != 0) {
          const int number = number_of(best.first), s = number / kMostCells, position = number % kMostCells;
          const Shape& shape = table.shapes[s];
          const int row = static_cast<int>(position * shape.per_columns >> kDivide);
          picks[k] = {{row, position - row * shape.columns, shape.h, shape.w}, s, score_of(best.first)};
        } else {
          picks[k] = picks[k - 1];
        }
      }
      if (best.second != 0) {
        nearest = min(nearest, static_cast<double>(score_of(best.first)) - static_cast<double>(score_of(best.second)));
      }
      __syncthreads();
    }
    picks += table.counts[group];
  }
  return nearest;
}

// One block an image. Windows are scored anew for every pick: cheaper than a place to keep them.
__global__ void __launch_bounds__(kLanes) part_windows_kernel(const float* activation, const Table table, Grid grid,
                                                              float* boxes, float* scores, float* margins) {
  SHARED_ARRAY(Range, range_of_warps, kWarps);
  SHARED_ARRAY(Best, best_of_warps, kWarps);
  SHARED_ARRAY(double, closest_of_warps, kWarps);
  SHARED_ARRAY(Pick, picks, SCAPHOID_MAX_WINDOWS);
  DYNAMIC_SHARED(double, integral);
  const int h = static_cast<int>(grid.h), w = static_cast<int>(grid.w), pitch = pitch_of(w);
  const int thread = static_cast<int>(threadIdx.x);
  const size_t image = blockIdx.x;

  const Range range =
      block_reduce(load(activation + image * (h * w), h, w, pitch, integral), range_of_warps, MergeRanges{});
  double margin = 0;
  if (range.largest < kNotFinite) {  // the same for the whole block
    integrate(integral, h, w, pitch);
    const double nearest = pick_all(table, integral, pitch, picks, best_of_warps);
    const double closest = min(nearest, block_min(closest_scores(picks, table.kept), closest_of_warps));
    // Picks without a rival decide nothing: as far from flipping as windows of a positive map can be.
    if (range.differs) margin = isinf(closest) ? 1 : closest / static_cast<double>(magnitude(range.largest));
  } else {
    for (int i = thread; i < table.kept; i += kLanes) picks[i] = {{0, 0, h, w}, 0, 0};
    __syncthreads();
  }
  for (int i = thread; i < table.kept * 4; i += kLanes) {
    const Window& window = picks[i / 4].window;
    const int side = i % 4, start = side % 2 == 0 ? window.left : window.top;
    const int before = side < 2 ? start : start + (side % 2 == 0 ? window.w : window.h);
    boxes[image * (table.kept * 4) + i] = static_cast<float>(grid.border(side, before));
  }
  for (int i = thread; i < table.kept; i += kLanes) scores[image * table.kept + i] = picks[i].score;
  if (thread == 0) margins[image] = static_cast<float>(margin);
}

}  // namespace
}  // namespace scaphoid

int scaphoid_part_windows_cuda(const float* activation, const scaphoid_window_groups* groups, int64_t batch, int64_t h,
                               int64_t w, int64_t height, int64_t width, float* boxes, float* scores, float* margin,
                               void* stream) {
  const bool small = h <= SCAPHOID_MAX_SIDE && w <= SCAPHOID_MAX_SIDE && batch <= INT_MAX;
  if (!small || !scaphoid::fits(*groups)) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const scaphoid::Grid grid{h, w, height, width};
  const size_t shared = static_cast<size_t>((h + 1) * scaphoid::pitch_of(static_cast<int>(w))) * sizeof(double);
  LAUNCH(scaphoid::part_windows_kernel, static_cast<unsigned>(batch), scaphoid::kLanes, shared, stream, activation,
         scaphoid::table_of(*groups, static_cast<int>(h), static_cast<int>(w)), grid, boxes, scores, margin);
  return cudaGetLastError();
}

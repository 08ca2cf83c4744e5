#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../scaphoid_ops.h"
#include "half.h"
#include "vectorised.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace scaphoid {
namespace {

constexpr int64_t kTile = 256;      // cells, neighbours in memory, whose sums are kept in the nearest cache
constexpr int64_t kPlanes = 4;      // that are summed before they are added to those sums
constexpr uintptr_t kAhead = 6144;  // bytes, from a plane that is read to the one that is asked for
constexpr int64_t kLanes = 16;      // weights are padded with zeros to a multiple of so many channels
constexpr int64_t kGroup = 3;       // rows of weights that are taken together there
constexpr int64_t kRows = (1 + SCAPHOID_MAX_CLASSES + kGroup - 1) / kGroup * kGroup;

inline float load(float value) { return value; }  // beside those of the half types
inline double load(double value) { return value; }

template <class Value, class Sum>
inline void widen(const Value* from, int64_t count, Sum* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}
inline void widen(const float* from, int64_t count, float* to) { std::copy(from, from + count, to); }
inline void widen(const double* from, int64_t count, double* to) { std::copy(from, from + count, to); }

#ifdef __x86_64__
// By the processor's own conversion, which gives what load() gives.
__attribute__((target("avx,f16c"))) void widen_by_f16c(const Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) to[i] = _cvtsh_ss(from[i].bits);
}

inline void widen(const Half* from, int64_t count, float* to) {
  if (__builtin_cpu_supports("f16c")) return widen_by_f16c(from, count, to);
  widen<Half, float>(from, count, to);
}
#endif

int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// What is summed: the features times rows of weights, of which the first is all ones. Padded with zeros, to whole
// groups of rows and, along a row, to whole lanes.
template <class Sum>
struct Rows {
  int64_t classes, count, channels, length;
  Sum* weights;  // [count, length]
  Sum* cell;     // [length], room for the features of one cell

  template <class Weight>
  Rows(const scaphoid_features& of, const Weight* weight, void* workspace)
      : classes(of.classes),
        count((of.classes + kGroup) / kGroup * kGroup),
        channels(of.channels),
        length(padded(channels)),
        weights(static_cast<Sum*>(workspace)) {
    cell = weights + count * length;
    std::fill(weights, cell + length, Sum(0));
    std::fill(weights, weights + channels, Sum(1));
    for (int64_t k = 0; k < of.classes; ++k) widen(weight + k * channels, channels, weights + (1 + k) * length);
  }
};

template <class Sum>
using Sums = Sum[kRows][kTile];

// Neighbours that are taken together, as compilers do not vectorise loops that prefetch: `bytes` of sums.
template <class Sum, int bytes>
struct Vector {
  typedef Sum Type __attribute__((vector_size(bytes)));
};

// Four planes times their weights, of a cell or of several; the first row's weights are ones.
struct Ones {
  template <class Several>
  void operator()(const Several& a, const Several& b, const Several& c, const Several& d, Several& sum) const {
    sum += (a + b) + (c + d);
  }
};
template <class Sum>
struct Weighted {
  Sum w, x, y, z;
  explicit Weighted(const Sum* weights) : w(weights[0]), x(weights[1]), y(weights[2]), z(weights[3]) {}
  template <class Several>
  void operator()(const Several& a, const Several& b, const Several& c, const Several& d, Several& sum) const {
    sum += (w * a + x * b) + (y * c + z * d);
  }
};

// What the processor is asked to fetch while it adds planes, so that it is there when its turn comes: a line of cache
// for each plane at a time. Where planes follow one another in memory, the lines do too: of a single stream, the
// processor itself fetches more.
template <class Value>
struct Ahead {
  static constexpr int64_t kCells = 64 / sizeof(Value);  // of a line
  uintptr_t first;                                       // a number, as it may lie behind the features' end
  uintptr_t stride, plane, step;  // bytes from plane to plane, from line to line, from one time to the next

  Ahead(const Value* features, int64_t elements, int64_t cells) : stride(elements * sizeof(Value)) {
    const uintptr_t bytes = kPlanes * cells * sizeof(Value);
    first = reinterpret_cast<uintptr_t>(features) + (kAhead + bytes - 1) / bytes * kPlanes * stride;
    plane = cells == elements ? 64 : stride;
    step = cells == elements ? kPlanes * 64 : 64;
  }

  void next_planes() { first += kPlanes * stride; }

  void ask(uintptr_t time) const {
    for (uintptr_t i = 0; i < kPlanes; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(first + i * plane + time * step));
    }
  }
};

// Adds planes of kTile cells at most to a group of rows of sums.
template <class Value, class Sum, class First>
struct Addition {
  const Value *a, *b, *c, *d;
  First first;
  Weighted<Sum> second, third;
  Sum (*sums)[kTile];

  // To the rows' sums from x on.
  template <class Several>
  void add(const Several& p, const Several& q, const Several& r, const Several& s, int64_t x) const {
    const auto add_to = [&](Sum* row, const auto& weights) {
      Several sum;
      std::memcpy(&sum, row + x, sizeof(sum));
      weights(p, q, r, s, sum);
      std::memcpy(row + x, &sum, sizeof(sum));
    };
    add_to(sums[0], first);
    add_to(sums[1], second);
    add_to(sums[2], third);
  }

  // Cells from x on, as many as one load takes; bfloat16 in the order that `put_in_order` undoes.
  void add_load(int64_t x) const {
    using Sums = typename Vector<Sum, 32>::Type;
    using Bits = typename Vector<uint32_t, 32>::Type;
    using Loaded = std::conditional_t<std::is_same_v<Value, BFloat16>, Bits, Sums>;
    Loaded p, q, r, s;  // an array would lie in memory
    std::memcpy(&p, a + x, sizeof(p));
    std::memcpy(&q, b + x, sizeof(q));
    std::memcpy(&r, c + x, sizeof(r));
    std::memcpy(&s, d + x, sizeof(s));
    if constexpr (std::is_same_v<Value, BFloat16>) {
      const Bits odd = Bits{} + 0xFFFF0000U;
      add<Sums>((Sums)(p << 16), (Sums)(q << 16), (Sums)(r << 16), (Sums)(s << 16), x);
      add<Sums>((Sums)(p & odd), (Sums)(q & odd), (Sums)(r & odd), (Sums)(s & odd), x + 8);
    } else {
      add(p, q, r, s, x);
    }
  }

  // All cells. Asks meanwhile for what comes later.
  template <class Later>
  void add_all(int64_t cells, const Later& later) const {
    constexpr int64_t kLine = Later::kCells, kLoad = 32 / sizeof(Value);
    int64_t x = 0;
    for (; x + kLine <= cells; x += kLine) {
      later.ask(x / kLine);
      for (int64_t i = 0; i < kLine; i += kLoad) add_load(x + i);
    }
    for (; x < cells; ++x) add<Sum>(load(a[x]), load(b[x]), load(c[x]), load(d[x]), x);
  }
};

// From the order in which Addition takes bfloat16, of sixteen neighbours the even ones first, to that in memory.
inline void put_in_order(int64_t cells, float* row) {
  constexpr int64_t kLine = Ahead<BFloat16>::kCells;
  for (int64_t x = 0; x + 16 <= cells / kLine * kLine; x += 16) {
    float taken[16];
    std::memcpy(taken, row + x, sizeof(taken));
    for (int64_t i = 0; i < 8; ++i) row[x + 2 * i] = taken[i], row[x + 2 * i + 1] = taken[8 + i];
  }
}

// Channels are planes of `stride` elements.
template <class Value, class Sum>
inline void sum_planes(const Value* features, int64_t stride, int64_t cells, const Rows<Sum>& rows, Sums<Sum>& sums) {
  constexpr bool kWidens = std::is_same_v<Value, Half>;  // by instructions that want a buffer
  using Plane = std::conditional_t<kWidens, Sum, Value>;
  static const Plane kZeros[kTile] = {};
  Sum widened[kPlanes][kTile];
  const int64_t last = rows.channels - 1;
  Ahead<Value> ahead(features, stride, cells);
  for (int64_t row = 0; row < rows.count; ++row) std::fill(sums[row], sums[row] + cells, Sum(0));
  for (int64_t channel = 0; channel <= last; channel += kPlanes) {
    const Plane* p[kPlanes];
    for (int64_t i = 0; i < kPlanes; ++i) {
      const Value* plane = features + std::min(channel + i, last) * stride;
      if constexpr (kWidens) {
        widen(plane, cells, widened[i]);
        p[i] = widened[i];
      } else {
        p[i] = plane;
      }
      if (channel + i > last) p[i] = kZeros;
    }
    const auto weights = [&](int64_t row) { return Weighted<Sum>(rows.weights + row * rows.length + channel); };
    const Addition<Plane, Sum, Ones> ones{p[0], p[1], p[2], p[3], {}, weights(1), weights(2), sums};
    ones.add_all(cells, ahead);
    for (int64_t row = kGroup; row < rows.count; row += kGroup) {
      const Addition<Plane, Sum, Weighted<Sum>> others{
          p[0], p[1], p[2], p[3], weights(row), weights(row + 1), weights(row + 2), sums + row};
      others.add_all(cells, ahead);
    }
    ahead.next_planes();
  }
  if constexpr (std::is_same_v<Value, BFloat16>) {
    for (int64_t row = 0; row <= rows.classes; ++row) put_in_order(cells, sums[row]);
  }
}

// The features of one cell times a group of rows. Two vectors of sums a row, which the compiler cuts to the processor's
// size; written out, as arrays of vectors would lie in memory.
template <class Value, class Sum>
inline void sum_group(const Sum* cell, const Sum* weights, int64_t length, const Value* next, Sum (&totals)[kGroup]) {
  typedef Sum Vector __attribute__((vector_size(32)));
  constexpr int64_t kStep = sizeof(Vector) / sizeof(Sum);
  const auto add = [](const Sum* row, const Vector& values, Vector& sum) {
    Vector vector;
    std::memcpy(&vector, row, sizeof(vector));
    sum += vector * values;
  };
  const auto total = [](const Vector& first, const Vector& second) {
    const Vector sum = first + second;
    const Sum even = sum[0] + sum[2], odd = sum[1] + sum[3];
    if constexpr (kStep == 4) return even + odd;
    return (even + (sum[kStep - 4] + sum[kStep - 2])) + (odd + (sum[kStep - 3] + sum[kStep - 1]));
  };
  Vector a0{}, a1{}, b0{}, b1{}, c0{}, c1{};
  for (int64_t i = 0; i < length; i += 2 * kStep) {
    __builtin_prefetch(next + i);
    Vector low, high;
    std::memcpy(&low, cell + i, sizeof(low));
    std::memcpy(&high, cell + i + kStep, sizeof(high));
    const Sum *a = weights + i, *b = a + length, *c = b + length;
    add(a, low, a0);
    add(a + kStep, high, a1);
    add(b, low, b0);
    add(b + kStep, high, b1);
    add(c, low, c0);
    add(c + kStep, high, c1);
  }
  totals[0] = total(a0, a1);
  totals[1] = total(b0, b1);
  totals[2] = total(c0, c1);
}

// Channels-last: each cell's channels lie side by side.
template <class Value, class Sum>
inline void sum_cells(const Value* features, int64_t cells, const Rows<Sum>& rows, Sums<Sum>& sums) {
  for (int64_t x = 0; x < cells; ++x, features += rows.channels) {
    const Sum* cell = rows.cell;
    if constexpr (std::is_same_v<Value, Sum>) {
      if (rows.channels == rows.length) cell = features;
    }
    if (cell == rows.cell) widen(features, rows.channels, rows.cell);
    const Value* next = x + 1 < cells ? features + rows.channels : features;  // is read from memory meanwhile
    for (int64_t row = 0; row < rows.count; row += kGroup) {
      Sum totals[kGroup];
      sum_group(cell, rows.weights + row * rows.length, rows.length, next, totals);
      for (int64_t i = 0; i < kGroup; ++i) sums[row + i][x] = totals[i];
    }
  }
}

// The norm over classes, in place of the first class' sums.
template <class Sum>
inline void norm(int64_t classes, int64_t cells, Sums<Sum>& sums) {
  Sum* norms = sums[1];
  for (int64_t x = 0; x < cells; ++x) norms[x] *= norms[x];
  for (int64_t row = 2; row <= classes; ++row) {
    for (int64_t x = 0; x < cells; ++x) norms[x] += sums[row][x] * sums[row][x];
  }
  for (int64_t x = 0; x < cells; ++x) norms[x] = std::sqrt(norms[x]);
}

template <class Value, class Sum>
inline void cells(const scaphoid_features& of, const Value* features, const Rows<Sum>& rows, int64_t first,
                  int64_t last, Sum* activation, Sum* class_activation) {
  alignas(64) Sums<Sum> sums;
  const int64_t map = of.h * of.w;
  for (int64_t cell = first; cell < last;) {
    const int64_t in_map = cell % map, count = std::min({kTile, map - in_map, last - cell});
    if (of.channels_last) {
      sum_cells(features + cell * of.channels, count, rows, sums);
    } else {
      sum_planes(features + (cell - in_map) * of.channels + in_map, map, count, rows, sums);
    }
    norm(of.classes, count, sums);
    std::copy(sums[0], sums[0] + count, activation + cell);
    std::copy(sums[1], sums[1] + count, class_activation + cell);
    cell += count;
  }
}

#define SCAPHOID_CELLS(name, Value, Sum)                                                                   \
  SCAPHOID_VECTORISED void name(const scaphoid_features& of, const Value* features, const Rows<Sum>& rows, \
                                int64_t first, int64_t last, Sum* activation, Sum* class_activation) {     \
    cells(of, features, rows, first, last, activation, class_activation);                                  \
  }
SCAPHOID_CELLS(of_values, Half, float)
SCAPHOID_CELLS(of_values, BFloat16, float)
SCAPHOID_CELLS(of_values, float, float)
SCAPHOID_CELLS(of_values, double, double)
#undef SCAPHOID_CELLS

template <class Value, class Weight, class Sum>
void activation_maps(const scaphoid_features& of, const void* features, const void* weight, int64_t first, int64_t last,
                     void* activation, void* class_activation, void* workspace) {
  const Rows<Sum> rows(of, static_cast<const Weight*>(weight), workspace);
  of_values(of, static_cast<const Value*>(features), rows, first, last, static_cast<Sum*>(activation),
            static_cast<Sum*>(class_activation));
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_activation_maps_workspace(const scaphoid_features* of) {
  const size_t size = of->dtype == SCAPHOID_F64 ? sizeof(double) : sizeof(float);
  const int64_t rows = (of->classes + scaphoid::kGroup) / scaphoid::kGroup * scaphoid::kGroup;
  return static_cast<size_t>((rows + 1) * scaphoid::padded(of->channels)) * size;
}

void scaphoid_activation_maps_cpu(const scaphoid_features* of, const void* features, const void* weight, int64_t first,
                                  int64_t last, void* activation, void* class_activation, void* workspace) {
  using namespace scaphoid;
  const bool wide = of->weight_dtype == SCAPHOID_F32;
  const auto run = of->dtype == SCAPHOID_F64   ? activation_maps<double, double, double>
                   : of->dtype == SCAPHOID_F32 ? activation_maps<float, float, float>
                   : of->dtype == SCAPHOID_F16
                       ? (wide ? activation_maps<Half, float, float> : activation_maps<Half, Half, float>)
                       : (wide ? activation_maps<BFloat16, float, float> : activation_maps<BFloat16, BFloat16, float>);
  run(*of, features, weight, first, last, activation, class_activation, workspace);
}

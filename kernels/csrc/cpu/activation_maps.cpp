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

constexpr int64_t kTile = 256;  // cells, neighbours in memory, whose sums are kept in the nearest cache
constexpr int64_t kBlock = 8;   // planes that are summed before they are added to those sums
constexpr int64_t kLanes = 16;  // weights are padded with zeros to a multiple of so many channels
constexpr int64_t kGroup = 3;   // rows of weights that are taken together there
constexpr int64_t kRows = (1 + SCAPHOID_MAX_CLASSES + kGroup - 1) / kGroup * kGroup;

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

// Asks for part `part` of `parts` of a range that is read next, while the processor computes with what it has.
inline void prefetch(const void* from, int64_t bytes, int64_t part, int64_t parts) {
  const int64_t lines = (bytes + 63) / 64;
  for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
    __builtin_prefetch(static_cast<const char*>(from) + line * 64);
  }
}

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

// Channels are planes of `stride` elements.
template <class Value, class Sum>
inline void sum_planes(const Value* features, int64_t stride, int64_t cells, const Rows<Sum>& rows, Sums<Sum>& sums) {
  Sum widened[kBlock][kTile];
  for (int64_t row = 0; row < rows.count; ++row) std::fill(sums[row], sums[row] + cells, Sum(0));
  for (int64_t channel = 0; channel < rows.channels; channel += kBlock) {
    const Sum* p[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      const bool present = channel + i < rows.channels;
      const Value* plane = features + (channel + i) * stride;
      p[i] = widened[i];
      if constexpr (std::is_same_v<Value, Sum>) {
        if (present) p[i] = plane;
      } else if (present) {
        widen(plane, cells, widened[i]);
      }
      if (!present) std::fill(widened[i], widened[i] + cells, Sum(0));
    }
    const int64_t next = channel + kBlock < rows.channels ? kBlock * stride : 0;
    for (int64_t row = 0; row <= rows.classes; ++row) {
      for (int64_t i = 0; i < kBlock; ++i) {
        prefetch(features + channel * stride + next + i * stride, cells * sizeof(Value), row, 1 + rows.classes);
      }
      const Sum* w = rows.weights + row * rows.length + channel;
      Sum* to = sums[row];
#pragma GCC ivdep
      for (int64_t x = 0; x < cells; ++x) {
        to[x] += ((w[0] * p[0][x] + w[1] * p[1][x]) + (w[2] * p[2][x] + w[3] * p[3][x])) +
                 ((w[4] * p[4][x] + w[5] * p[5][x]) + (w[6] * p[6][x] + w[7] * p[7][x]));
      }
    }
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
  Sums<Sum> sums;
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

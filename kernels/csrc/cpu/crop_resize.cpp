#include <algorithm>

#include "../scaphoid_ops.h"
#include "bilinear.h"
#include "half.h"

#ifdef __x86_64__
#include <immintrin.h>
#define SCAPHOID_AVX2 __attribute__((target("avx2")))
#endif

namespace scaphoid {
namespace {

constexpr int64_t kGroup = 8;           // outputs that are computed together
constexpr int64_t kReach = 2 * kGroup;  // mixed pixels that a group picks from, and as many one further right

int64_t padded(int64_t size) { return (size + kGroup - 1) / kGroup * kGroup; }
int64_t row_length(int64_t size) { return 2 * (padded(size) + kReach); }
bool interleaved(const scaphoid_crops& of) {
  return of.channels > 1 && of.channel_stride == 1 && of.column_stride == of.channels;
}

// The columns that a crop reads. Two image rows are mixed into one first, pixel by pixel, and outputs then mix a pixel
// of that row with its right neighbour. The mixed row has all columns [first, first + span), the last one twice, where
// 8 outputs read from no more than 16 of them, else just the two columns of each output.
template <class Real>
struct Columns {
  int64_t size;
  Real* weight;   // [padded size]
  int32_t* low;   // [padded size], in the mixed row from the group's base
  int32_t* base;  // [groups]
  int32_t* pair;  // [2 * size]: image columns, where pairs are read
  int64_t first, span;
  bool pairs;

  Columns(int64_t size, void* workspace) : size(size) {
    const int64_t length = padded(size);
    weight = static_cast<Real*>(workspace);
    low = reinterpret_cast<int32_t*>(weight + length);
    base = low + length;
    pair = base + length;
  }

  static int64_t bytes(int64_t size) { return padded(size) * static_cast<int64_t>(sizeof(Real) + 4 * sizeof(int32_t)); }

  void fill(Real start, Real end, int64_t width) {
    for (int64_t j = 0; j < size; ++j) {
      const Sample<Real> x(start, end, static_cast<int32_t>(j), static_cast<int32_t>(size),
                           static_cast<int32_t>(width));
      low[j] = pair[2 * j] = x.low;
      pair[2 * j + 1] = x.high;
      weight[j] = x.weight;
    }
    // Positions rise or fall all along: the ends of a range of outputs bound the columns it reads.
    first = std::min(low[0], low[size - 1]);
    span = std::max(pair[1], pair[2 * size - 1]) - first + 1;
    pairs = span > 2 * size + kReach;
    for (int64_t j = 0; j < size; j += kGroup) {
      const int32_t from = low[j], to = low[std::min(size, j + kGroup) - 1];
      base[j / kGroup] = std::min(from, to);
      pairs |= std::max(from, to) - base[j / kGroup] >= kReach;
    }
    for (int64_t j = 0; j < padded(size); ++j) {
      int32_t& group = base[j / kGroup];
      low[j] = j >= size ? 0 : pairs ? static_cast<int32_t>(2 * (j % kGroup)) : low[j] - group;
      if (j >= size) weight[j] = 0;
      if (j % kGroup == kGroup - 1) group = static_cast<int32_t>(pairs ? 2 * (j + 1 - kGroup) : group - first);
    }
  }
};

template <class Pixel, class Real>
void mix_rows(const Pixel* __restrict upper, const Pixel* __restrict lower, int64_t count, Real weight,
              Real* __restrict out) {
  for (int64_t k = 0; k < count; ++k) out[k] = mix(load(upper[k]), load(lower[k]), weight);
}

template <class Real>
void take_channel(const Real* __restrict pixels, int64_t channels, int64_t count, Real* __restrict out) {
  if (channels == 3) {  // a constant stride vectorises
    for (int64_t k = 0; k < count; ++k) out[k] = pixels[k * 3];
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = pixels[k * channels];
  }
}

// Along the row: outputs from a mixed row.
struct Portable {
  template <class Pixel, class Real>
  static void resample(const Columns<Real>& columns, const Real* mixed, Pixel* out) {
    for (int64_t j = 0; j < columns.size; ++j) {
      const Real* pixels = mixed + columns.base[j / kGroup];
      store(mix(pixels[columns.low[j]], pixels[columns.low[j] + 1], columns.weight[j]), out + j);
    }
  }
};

#ifdef SCAPHOID_AVX2
// A group's pixels lie in two registers, from which its outputs pick: several times faster than gathering.
struct Avx2 {
  SCAPHOID_AVX2 static __m256 pick(const float* pixels, __m256i index) {
    const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(pixels), index);
    const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(pixels + kGroup), index);
    return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3: which
  }

  SCAPHOID_AVX2 static __m256 group(const Columns<float>& columns, const float* mixed, int64_t j) {
    const float* pixels = mixed + columns.base[j / kGroup];
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns.low + j));
    const __m256 low = pick(pixels, index), high = pick(pixels + 1, index);
    return _mm256_add_ps(low, _mm256_mul_ps(_mm256_loadu_ps(columns.weight + j), _mm256_sub_ps(high, low)));
  }

  SCAPHOID_AVX2 static void store_group(__m256 values, float* out) { _mm256_storeu_ps(out, values); }
  SCAPHOID_AVX2 static void store_group(__m256 values, uint8_t* out) {
    const __m256i whole = _mm256_cvtps_epi32(values);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
  }
  template <class Pixel>
  SCAPHOID_AVX2 static void store_group(__m256 values, Pixel* out) {
    float lanes[kGroup];
    _mm256_storeu_ps(lanes, values);
    for (int64_t k = 0; k < kGroup; ++k) store(lanes[k], out + k);
  }

  template <class Pixel>
  SCAPHOID_AVX2 static void resample(const Columns<float>& columns, const float* mixed, Pixel* out) {
    int64_t j = 0;
    for (; j + kGroup <= columns.size; j += kGroup) store_group(group(columns, mixed, j), out + j);
    if (j < columns.size) {
      Pixel rest[kGroup];
      store_group(group(columns, mixed, j), rest);
      std::copy(rest, rest + columns.size - j, out + j);
    }
  }
};
#endif

template <class Processor, class Pixel, class Real>
void crop_rows(const scaphoid_crops& of, const Pixel* image, const Real* boxes, int64_t first, int64_t last,
               Pixel* crops, void* workspace) {
  auto* mixed = static_cast<Real*>(workspace);  // one channel's row
  auto* pixels = mixed + row_length(of.size);   // every channel's, where they are interleaved
  Columns<Real> columns(of.size, pixels + (interleaved(of) ? of.channels * row_length(of.size) : 0));
  for (int64_t row = first; row < last;) {
    const int64_t crop = row / of.size, begin = row % of.size, end = std::min(of.size, begin + last - row);
    const Real* box = boxes + crop * 4;
    columns.fill(box[0], box[2], of.width);
    const bool together = interleaved(of) && !columns.pairs;
    for (int64_t i = begin; i < end; ++i) {
      const Sample<Real> y(box[1], box[3], static_cast<int32_t>(i), static_cast<int32_t>(of.size),
                           static_cast<int32_t>(of.height));
      const Pixel* in_image = image + (crop / of.count) * of.batch_stride;
      const Pixel* from = in_image + (columns.pairs ? 0 : columns.first * of.column_stride);
      const Pixel *upper = from + y.low * of.row_stride, *lower = from + y.high * of.row_stride;
      if (together) mix_rows(upper, lower, columns.span * of.channels, y.weight, pixels);
      for (int64_t c = 0; c < of.channels; ++c, upper += of.channel_stride, lower += of.channel_stride) {
        if (columns.pairs) {
          for (int64_t k = 0; k < 2 * of.size; ++k) {
            const int64_t x = columns.pair[k] * of.column_stride;
            mixed[k] = mix(load(upper[x]), load(lower[x]), y.weight);
          }
        } else if (together) {
          take_channel(pixels + c, of.channels, columns.span, mixed);
        } else if (of.column_stride == 1) {
          mix_rows(upper, lower, columns.span, y.weight, mixed);
        } else {
          for (int64_t k = 0; k < columns.span; ++k) {
            const int64_t x = k * of.column_stride;
            mixed[k] = mix(load(upper[x]), load(lower[x]), y.weight);
          }
        }
        if (!columns.pairs) mixed[columns.span] = mixed[columns.span - 1];
        Processor::resample(columns, mixed, crops + ((crop * of.channels + c) * of.size + i) * of.size);
      }
    }
    row += end - begin;
  }
}

#ifdef SCAPHOID_AVX2
template <class Pixel>
SCAPHOID_AVX2 __attribute__((flatten)) void avx2_rows(const scaphoid_crops& of, const Pixel* image, const float* boxes,
                                                      int64_t first, int64_t last, Pixel* crops, void* workspace) {
  crop_rows<Avx2>(of, image, boxes, first, last, crops, workspace);
}
#endif

// The same results on every processor: neither path contracts or reorders arithmetic.
template <class Pixel>
void crop_pixels(const scaphoid_crops& of, const void* image, const void* boxes, int64_t first, int64_t last,
                 void* crops, void* workspace) {
  const auto* from = static_cast<const Pixel*>(image);
  const auto* box = static_cast<const float*>(boxes);
  auto* to = static_cast<Pixel*>(crops);
#ifdef SCAPHOID_AVX2
  if (__builtin_cpu_supports("avx2")) return avx2_rows(of, from, box, first, last, to, workspace);
#endif
  crop_rows<Portable>(of, from, box, first, last, to, workspace);
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_crop_resize_workspace(const scaphoid_crops* of) {
  const int64_t rows = scaphoid::interleaved(*of) ? of->channels + 1 : 1;
  return rows * scaphoid::row_length(of->size) * sizeof(double) + scaphoid::Columns<double>::bytes(of->size);
}

void scaphoid_crop_resize_cpu(const scaphoid_crops* of, scaphoid_dtype dtype, const void* image, const void* boxes,
                              int64_t first, int64_t last, void* crops, void* workspace) {
  using namespace scaphoid;
  switch (dtype) {
    case SCAPHOID_U8: return crop_pixels<uint8_t>(*of, image, boxes, first, last, crops, workspace);
    case SCAPHOID_F16: return crop_pixels<Half>(*of, image, boxes, first, last, crops, workspace);
    case SCAPHOID_BF16: return crop_pixels<BFloat16>(*of, image, boxes, first, last, crops, workspace);
    case SCAPHOID_F32: return crop_pixels<float>(*of, image, boxes, first, last, crops, workspace);
    case SCAPHOID_F64:
      crop_rows<Portable>(*of, static_cast<const double*>(image), static_cast<const double*>(boxes), first, last,
                          static_cast<double*>(crops), workspace);
  }
}

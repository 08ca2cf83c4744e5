#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "key_area.h"

namespace scaphoid {
namespace {

template <class Real>
KeyAxis decide(const double* marginal, int64_t cells, const Real* weight, const Real* bias) {
  const auto [low, high] = std::minmax_element(marginal, marginal + cells);
  const double least = *low, range = *high - *low;
  const bool finite = std::all_of(marginal, marginal + cells, [](double sum) { return std::isfinite(sum); });
  if (!finite || !std::isfinite(range)) return KeyAxis::undefined();
  int64_t peak = 0;
  double runner_up = least, logit = static_cast<double>(*bias);
  for (int64_t i = 0; i < cells; ++i) {
    const double scaled = range > 0 ? (marginal[i] - least) / range : 0;
    logit += static_cast<double>(weight[i]) * scaled;
    if (marginal[i] > marginal[peak]) peak = i;
  }
  for (int64_t i = 0; i < cells; ++i) {
    if (i != peak) runner_up = std::max(runner_up, marginal[i]);
  }
  return KeyAxis::decided(peak, cells, marginal[peak] - runner_up, logit);
}

template <class Real>
void key_area_boxes(const void* activation, const void* width_weight, const void* width_bias, const void* height_weight,
                    const void* height_bias, int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width,
                    void* boxes, void* margin, void* workspace) {
  const auto real = [](const void* values) { return static_cast<const Real*>(values); };
  auto *columns = static_cast<double*>(workspace), *rows = columns + w;
  const Real* cell = real(activation);
  for (int64_t b = 0; b < batch; ++b) {
    std::fill(columns, columns + w + h, 0.0);
    double largest = 0;
    for (int64_t r = 0; r < h; ++r) {
      for (int64_t c = 0; c < w; ++c) {
        const auto value = static_cast<double>(*cell++);
        columns[c] += value;
        rows[r] += value;
        largest = std::max(largest, std::fabs(value));
      }
    }
    const KeyAxis x = decide(columns, w, real(width_weight), real(width_bias));
    const KeyAxis y = decide(rows, h, real(height_weight), real(height_bias));
    write_key_area(x, y, largest, h, w, height, width, static_cast<Real*>(boxes) + 4 * b,
                   static_cast<Real*>(margin) + b);
  }
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_key_area_box_workspace(int64_t h, int64_t w) { return static_cast<size_t>(h + w) * sizeof(double); }

void scaphoid_key_area_box_cpu(scaphoid_dtype dtype, const void* activation, const void* width_weight,
                               const void* width_bias, const void* height_weight, const void* height_bias,
                               int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width, void* boxes,
                               void* margin, void* workspace) {
  const auto run = dtype == SCAPHOID_F64 ? scaphoid::key_area_boxes<double> : scaphoid::key_area_boxes<float>;
  run(activation, width_weight, width_bias, height_weight, height_bias, batch, h, w, height, width, boxes, margin,
      workspace);
}

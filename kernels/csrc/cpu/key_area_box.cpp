#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"

namespace scaphoid {
namespace {

// What one axis decides: where the marginal peaks and how wide the box is, in units of the image's side, so the centre
// of cell `i` of `n` is (i + 0.5) / n; and by how much the largest sum leads the second largest.
struct Axis {
  double centre = 0.5, size = 1, lead = 0;
  bool defined = false;

  template <class Real>
  Axis(const double* marginal, int64_t cells, const Real* weight, const Real* bias) {
    const auto [low, high] = std::minmax_element(marginal, marginal + cells);
    const double least = *low, range = *high - *low;
    for (int64_t i = 0; i < cells; ++i) {
      if (!std::isfinite(marginal[i])) return;
    }
    if (!std::isfinite(range)) return;
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
    if (std::isnan(logit)) return;
    size = 1 / (1 + std::exp(-logit));
    centre = (static_cast<double>(peak) + 0.5) / static_cast<double>(cells);
    lead = marginal[peak] - runner_up;
    defined = true;
  }

  // The interval around the centre, the centre moved so that it stays inside the image.
  template <class Real>
  void interval(int64_t pixels, Real* start, Real* end) const {
    const double half = size / 2, inside = std::min(std::max(centre, half), 1 - half);
    *start = static_cast<Real>(std::max(inside - half, 0.0) * static_cast<double>(pixels));
    *end = static_cast<Real>(std::min(inside + half, 1.0) * static_cast<double>(pixels));
  }
};

template <class Real>
struct Arguments {
  const Real *width_weight, *width_bias, *height_weight, *height_bias;
  int64_t h, w, height, width;
};

template <class Real>
void key_area_box(const Real* activation, const Arguments<Real>& of, Real* box, Real* margin, double* marginals) {
  double *columns = marginals, *rows = marginals + of.w;
  std::fill(marginals, marginals + of.w + of.h, 0.0);
  double largest = 0;
  for (int64_t r = 0; r < of.h; ++r) {
    for (int64_t c = 0; c < of.w; ++c) {
      const auto cell = static_cast<double>(activation[r * of.w + c]);
      columns[c] += cell;
      rows[r] += cell;
      largest = std::max(largest, std::fabs(cell));
    }
  }
  const Axis x(columns, of.w, of.width_weight, of.width_bias), y(rows, of.h, of.height_weight, of.height_bias);
  box[0] = box[1] = *margin = 0;
  box[2] = static_cast<Real>(of.width);
  box[3] = static_cast<Real>(of.height);
  if (!x.defined || !y.defined) return;
  x.interval(of.width, box, box + 2);
  y.interval(of.height, box + 1, box + 3);
  // Relative to the map's maximum, as an engine's error is: a sum of n cells errs by at most n times that of a cell.
  const double lead = std::min(x.lead / static_cast<double>(of.h), y.lead / static_cast<double>(of.w));
  *margin = largest > 0 ? static_cast<Real>(lead / largest) : 0;
}

template <class Real>
void key_area_boxes(const Real* activation, const Arguments<Real>& of, int64_t batch, Real* boxes, Real* margin,
                    void* workspace) {
  for (int64_t b = 0; b < batch; ++b) {
    key_area_box(activation + b * of.h * of.w, of, boxes + b * 4, margin + b, static_cast<double*>(workspace));
  }
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_key_area_box_workspace(int64_t h, int64_t w) { return static_cast<size_t>(h + w) * sizeof(double); }

void scaphoid_key_area_box_cpu_f32(const float* activation, const float* width_weight, const float* width_bias,
                                   const float* height_weight, const float* height_bias, int64_t batch, int64_t h,
                                   int64_t w, int64_t height, int64_t width, float* boxes, float* margin,
                                   void* workspace) {
  scaphoid::key_area_boxes<float>(activation,
                                  {width_weight, width_bias, height_weight, height_bias, h, w, height, width}, batch,
                                  boxes, margin, workspace);
}

void scaphoid_key_area_box_cpu_f64(const double* activation, const double* width_weight, const double* width_bias,
                                   const double* height_weight, const double* height_bias, int64_t batch, int64_t h,
                                   int64_t w, int64_t height, int64_t width, double* boxes, double* margin,
                                   void* workspace) {
  scaphoid::key_area_boxes<double>(activation,
                                   {width_weight, width_bias, height_weight, height_bias, h, w, height, width}, batch,
                                   boxes, margin, workspace);
}

#include <cstdint>

#include "../cpu/key_area.h"
#include "../scaphoid_ops.h"
#include "launch.h"
#include "reduce.h"

namespace scaphoid {
namespace {

constexpr int kSide = SCAPHOID_MAX_SIDE;
constexpr int kThreads = 2 * kSide;  // half a block an axis: columns for x, rows for y
static_assert(kSide == 2 * kWarp, "a lane holds two sums of an axis");

struct Maps {
  int h, w;
  int64_t height, width;
};

// One warp decides one axis. Sums are added to the logit in the CPU's order; `products` is room for one number a sum.
template <class Real>
__device__ KeyAxis decide(const double* marginal, int cells, const Real* weight, const Real* bias, double* products) {
  const int lane = threadIdx.x % kWarp, second = lane + kWarp;
  const double sums[2] = {lane < cells ? marginal[lane] : -INFINITY, second < cells ? marginal[second] : -INFINITY};
  const bool finite = (lane >= cells || isfinite(sums[0])) && (second >= cells || isfinite(sums[1]));
  if (!__all_sync(kWholeWarp, finite)) return KeyAxis::undefined();

  double least = fmin(lane < cells ? sums[0] : INFINITY, second < cells ? sums[1] : INFINITY);
  Peak<double> peak = First{}(Peak<double>{sums[0], lane}, Peak<double>{sums[1], second});
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    least = Min{}(least, exchange(least, lanes));
    peak = First{}(peak, exchange(peak, lanes));
  }
  double runner_up = fmax(lane == peak.index ? least : sums[0], second == peak.index ? least : sums[1]);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) runner_up = Max{}(runner_up, exchange(runner_up, lanes));
  const double range = peak.value - least;
  if (!isfinite(range)) return KeyAxis::undefined();

  for (int i = lane; i < cells; i += kWarp) {
    const double scaled = range > 0 ? (marginal[i] - least) / range : 0;
    products[i] = static_cast<double>(weight[i]) * scaled;
  }
  __syncwarp();
  double logit = static_cast<double>(*bias);
  for (int i = 0; i < cells; ++i) logit += products[i];
  return KeyAxis::decided(peak.index, cells, peak.value - runner_up, logit);
}

// A block takes a map.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    key_area_box_kernel(const Real* __restrict__ activation, const Real* __restrict__ width_weight,
                        const Real* __restrict__ width_bias, const Real* __restrict__ height_weight,
                        const Real* __restrict__ height_bias, Maps of, Real* __restrict__ boxes,
                        Real* __restrict__ margin) {
  SHARED_ARRAY(Real, map, kSide * (kSide + 1));
  SHARED_ARRAY(double, marginals, kThreads);
  SHARED_ARRAY(double, products, kThreads);
  SHARED_ARRAY(Real, largest_of_row, kSide);
  SHARED_ARRAY(KeyAxis, axes, 2);
  const int axis = threadIdx.x / kSide, i = threadIdx.x % kSide, cells = axis == 0 ? of.w : of.h;
  const int pitch = of.w | 1;  // odd: threads that walk along rows find 32 banks
  const Real* from = activation + static_cast<int64_t>(blockIdx.x) * of.h * of.w;
  for (int r = axis; r < of.h; r += 2) {
    if (i < of.w) map[r * pitch + i] = from[r * of.w + i];
  }
  __syncthreads();

  if (i < cells) {
    const int start = axis == 0 ? i : i * pitch, step = axis == 0 ? pitch : 1, count = axis == 0 ? of.h : of.w;
    double sum = 0;
    Real largest = 0;
    for (int n = 0; n < count; ++n) {
      const Real cell = map[start + n * step];
      sum += static_cast<double>(cell);
      largest = Max{}(largest, cell < 0 ? -cell : cell);
    }
    marginals[threadIdx.x] = sum;
    if (axis == 1) largest_of_row[i] = largest;
  }
  __syncthreads();

  if (i < kWarp) {
    const int first = axis * kSide;
    const KeyAxis decided = decide(marginals + first, cells, axis == 0 ? width_weight : height_weight,
                                   axis == 0 ? width_bias : height_bias, products + first);
    if (i == 0) axes[axis] = decided;
  }
  __syncthreads();

  if (threadIdx.x != 0) return;
  Real largest = 0;
  for (int r = 0; r < of.h; ++r) largest = Max{}(largest, largest_of_row[r]);
  write_key_area(axes[0], axes[1], static_cast<double>(largest), of.h, of.w, of.height, of.width,
                 boxes + 4 * static_cast<int64_t>(blockIdx.x), margin + blockIdx.x);
}

template <class Real>
void launch(const void* activation, const void* width_weight, const void* width_bias, const void* height_weight,
            const void* height_bias, int64_t batch, const Maps& of, void* boxes, void* margin, void* stream) {
  const auto real = [](const void* values) { return static_cast<const Real*>(values); };
  LAUNCH((key_area_box_kernel<Real>), dim3(static_cast<unsigned>(batch)), dim3(kThreads), 0, stream, real(activation),
         real(width_weight), real(width_bias), real(height_weight), real(height_bias), of, static_cast<Real*>(boxes),
         static_cast<Real*>(margin));
}

}  // namespace
}  // namespace scaphoid

int scaphoid_key_area_box_cuda(scaphoid_dtype dtype, const void* activation, const void* width_weight,
                               const void* width_bias, const void* height_weight, const void* height_bias,
                               int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width, void* boxes,
                               void* margin, void* stream) {
  if (h > SCAPHOID_MAX_SIDE || w > SCAPHOID_MAX_SIDE || batch > INT32_MAX) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const auto run = dtype == SCAPHOID_F64 ? scaphoid::launch<double> : scaphoid::launch<float>;
  run(activation, width_weight, width_bias, height_weight, height_bias, batch,
      {static_cast<int>(h), static_cast<int>(w), height, width}, boxes, margin, stream);
  return cudaGetLastError();
}

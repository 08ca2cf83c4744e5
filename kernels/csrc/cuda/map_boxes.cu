#include "../cpu/windows.h"
#include "../scaphoid_ops.h"
#include "launch.h"

namespace scaphoid {
namespace {

constexpr int kThreads = 128;

// A thread a coordinate: four neighbours share an image's scores and take 16 bytes of a box together.
__global__ void __launch_bounds__(kThreads) map_boxes_kernel(ScoredWindows windows, int64_t batch, float* mapped) {
  const int64_t image = int64_t{blockIdx.x} * (kThreads / 4) + threadIdx.x / 4;
  if (image >= batch) return;
  const int side = static_cast<int>(threadIdx.x % 4);
  mapped[image * 4 + side] = windows.mapped(image, side);
}

}  // namespace
}  // namespace scaphoid

int scaphoid_map_boxes_cuda(const float* boxes, const float* scores, double gamma, const float* object_boxes,
                            const int32_t* original_sizes, int64_t batch, int64_t n, int64_t height, int64_t width,
                            float* mapped, void* stream) {
  if (batch > INT32_MAX) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  const scaphoid::ScoredWindows windows(boxes, scores, gamma, object_boxes, original_sizes, n, height, width);
  const auto blocks = static_cast<unsigned>((batch + scaphoid::kThreads / 4 - 1) / (scaphoid::kThreads / 4));
  LAUNCH(scaphoid::map_boxes_kernel, blocks, scaphoid::kThreads, 0, stream, windows, batch, mapped);
  return cudaGetLastError();
}
